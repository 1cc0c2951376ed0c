"""AdamW and the learning-rate schedule, counted in images."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    """AdamW on what is trained of one network; matrices decay, vectors do not."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: Optim) -> None:
        self.config = config
        self.parameters = [p for _, p in named if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True
        )

    def step(self, images_seen: int, total_images: int) -> Tensor:
        """Add up the processes' gradients, clip, set the learning rate, step, clear gradients.

        Returns the gradient norm before clipping (scalar).
        """
        ranks.add_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr_at(self.config, images_seen, total_images)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return ranks.whole(norm)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop the state of parameters that were re-initialised; the next step starts theirs anew."""
        for parameter in parameters:
            self.adamw.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """The moments; learning rates are recomputed from the images seen, not stored."""
        return {"adamw": self.adamw.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.adamw.load_state_dict({"state": state["adamw"], "param_groups": self.adamw.state_dict()["param_groups"]})
        for parameter, moments in self.adamw.state.items():  # fused AdamW pairs elements by memory: same layout, or nonsense
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype)
                    ranks.put(moments[name], value)
