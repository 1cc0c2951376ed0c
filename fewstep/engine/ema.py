"""Exponential moving average of weights, with its half-life counted in images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.engine import ranks


class EMA:
    """Average of the parameters of `modules` in float32 (buffers are constants of the configuration, not averaged).

    Args:
        modules: the networks to follow, by name.
        half_life_images: images after which an old value counts half. Early on the half-life is a tenth of the
            images seen (ours, after EDM2's ramp), so that the average forgets the initial weights.
    """

    def __init__(self, modules: dict[str, nn.Module], half_life_images: float) -> None:
        if half_life_images <= 0:
            raise ValueError(f"ema_half_life_images must be positive, not {half_life_images}")
        self.half_life_images = half_life_images
        self.modules = modules
        self.average: dict[str, Tensor] = {
            name: p.detach().float().clone() for name, p in self._live().items() if p.requires_grad
        }

    def _live(self) -> dict[str, Tensor]:
        return {f"{m}.{n}": p for m, module in self.modules.items() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, images_seen: int, images: int) -> None:
        """Move towards the live weights after a step of `images` images, `images_seen` before it."""
        half_life = min(self.half_life_images, 0.1 * images_seen)
        decay = 0.5 ** (images / half_life) if half_life > 0 else 0.0
        live = self._live()
        names = list(self.average)
        torch._foreach_lerp_([self.average[n] for n in names], [live[n].float() for n in names], 1 - decay)

    @torch.no_grad()
    def copy_to(self, modules: dict[str, nn.Module]) -> None:
        """Write the averages into networks of the same names and shapes."""
        for m, module in modules.items():
            for n, p in module.named_parameters():
                if f"{m}.{n}" in self.average:
                    p.copy_(self.average[f"{m}.{n}"])

    def state_dict(self) -> dict[str, Any]:
        """The averages, by parameter name."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore averages written by `state_dict`."""
        for name, value in state.items():
            ranks.put(self.average[name], value)
