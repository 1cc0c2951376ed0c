"""Optimisers and the learning-rate schedule, both counted in images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Optim:
    """How a network is optimised.

    Attributes:
        name: "adamw", or "muon": orthogonalised momentum for the matrices inside blocks, AdamW for all else.
        lr: peak learning rate; Muon's update is scaled to AdamW's size, so one number serves both.
        betas: AdamW's moments.
        weight_decay: decoupled, on matrices only.
        clip_norm: gradients are scaled down to this global norm.
        warmup_images: linear warm-up.
        final_lr_ratio: the learning rate at the end, relative to the peak (cosine in between); 1 keeps it flat.
    """

    name: Literal["adamw", "muon"] = "adamw"
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
    """One network's optimiser: AdamW alone, or Muon for block matrices beside AdamW for the rest."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: Optim) -> None:
        trained = [(n, p) for n, p in named if p.requires_grad]
        hidden = [p for n, p in trained if config.name == "muon" and p.ndim == 2 and "block" in n]
        chosen = {id(p) for p in hidden}
        rest = [p for _, p in trained if id(p) not in chosen]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.config = config
        self.parameters = [p for _, p in trained]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
        ]
        if hidden:
            self.parts.append(
                torch.optim.Muon(
                    hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    def step(self, images_seen: int, total_images: int) -> Tensor:
        """Clip, set the learning rate, step, clear gradients. Returns the gradient norm before clipping (scalar)."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr_at(self.config, images_seen, total_images)
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop the state of parameters that were re-initialised; the next step starts theirs anew."""
        for parameter in parameters:
            for part in self.parts:
                part.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """States of the parts; learning rates are recomputed from the images seen, not stored."""
        return {"parts": [p.state_dict()["state"] for p in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore states written by `state_dict`."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict({"state": saved, "param_groups": part.state_dict()["param_groups"]})
            for parameter, state in part.state.items():  # fused AdamW pairs elements by memory: same layout, or nonsense
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
