"""AdamW and the learning-rate schedule, counted in images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.engine import ranks


@dataclass(frozen=True)
class Optim:
    """How a network is optimised.

    Attributes:
        lr: peak learning rate.
        betas: AdamW's moments.
        weight_decay: decoupled, on matrices only.
        clip_norm: gradients are scaled down to this global norm.
        warmup_images: linear warm-up.
        final_lr_ratio: the learning rate at the end, relative to the peak (cosine in between); 1 keeps it flat.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_images: int = 0
    final_lr_ratio: float = 1.0


def lr_at(config: Optim, images_seen: int, total_images: int) -> float:
    """Learning rate for the step that starts at `images_seen`."""
    warm = min(1.0, (images_seen + 1) / config.warmup_images) if config.warmup_images else 1.0
    progress = min(1.0, images_seen / max(1, total_images))
    cosine = config.final_lr_ratio + (1 - config.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * warm * cosine


class Optimizer:
    """AdamW on what is trained of one network; matrices decay, vectors do not.

    Args:
        named: parameters by name; frozen ones are left out.
        config: settings.
        eight_bit: keep the moments of large matrices in 8 bits (torchao).

    Raises:
        ValueError: `eight_bit` without torchao.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: Optim, eight_bit: bool = False) -> None:
        self.config, self.eight_bit = config, eight_bit
        self.parameters = [p for _, p in named if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        if eight_bit:
            self.adamw: torch.optim.Optimizer = _eight_bit_adamw()(groups, lr=config.lr, betas=config.betas)
        else:
            self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    def step(self, images_seen: int, total_images: int) -> Tensor:
        """Add up the processes' gradients, clip, set the learning rate, step, clear gradients.

        Returns the gradient norm before clipping (scalar).
        """
        ranks.add_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        lr = lr_at(self.config, images_seen, total_images)
        for group in self.adamw.param_groups:
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        # torchao compiles its update, which needs a compiler and, on a CPU, gains nothing
        eager = self.eight_bit and self.parameters[0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return ranks.whole(norm)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop the state of parameters that were re-initialised; the next step starts theirs anew."""
        for parameter in parameters:
            self.adamw.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """The moments; learning rates are recomputed from the images seen, not stored."""
        state = self.adamw.state_dict()["state"]
        if self.eight_bit:  # codes and scales of those in 8 bits
            state = {k: {name: _parts(value) for name, value in moments.items()} for k, moments in state.items()}
        return {"adamw": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.eight_bit:
            self._load_eight_bit(state["adamw"])
            return
        self.adamw.load_state_dict({"state": state["adamw"], "param_groups": self.adamw.state_dict()["param_groups"]})
        for parameter, moments in self.adamw.state.items():  # fused AdamW pairs elements by memory: same layout, or nonsense
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype)
                    ranks.put(moments[name], value)

    @torch.no_grad()
    def _load_eight_bit(self, stored: Mapping[int, Mapping[str, Any]]) -> None:
        self.adamw.state.clear()
        parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        for number, moments in stored.items():
            parameter = parameters[number]
            for name, value in moments.items():
                if name != "step":
                    made = self.adamw._new_buffer(parameter, signed=name == "exp_avg")  # type: ignore[attr-defined]
                    for part, numbers in value.items() if isinstance(value, Mapping) else ():
                        getattr(made, part).copy_(numbers)
                    value = made if isinstance(value, Mapping) else made.copy_(value)
                self.adamw.state[parameter][name] = value.clone() if name == "step" else value


def _parts(value: Tensor) -> Tensor | dict[str, Tensor]:
    """What of a moment is stored; the table that its codes point into is always the same."""
    return {part: getattr(value, part) for part in ("codes", "scale")} if hasattr(value, "codes") else value


def _eight_bit_adamw() -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise ValueError("roles.eight_bit_moments needs torchao: pip install 'fewstep[quant]'") from None
    return AdamW8bit
