"""The denoiser of a model as batches that are asked for velocities step by step, with what is known of each prompt kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity
from fewstep.models import sd3
from fewstep.serve import fast, opening
from fewstep.serve.text import Recent

KNOWN = 2**28  # bytes of what is known of prompts


class Plain:
    """Prompts that are drawn together by a velocity that takes whole conditions, such as another runtime's."""

    def __init__(self, velocities: Sequence[Velocity], grid: Sequence[float], cond: TextCond) -> None:
        self._velocities, self._grid, self._cond = velocities, grid, cond

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """Of latents (B, 16, H, W) at the start of a step, from 0."""
        return self._velocities[step](x, torch.full((len(x),), self._grid[step]), self._cond)


class Turns:
    """Batches of which each draws steps of its own: those of a split student's branches."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """As `Plain.velocity`."""
        return self._batches[step].velocity(x, step)  # type: ignore[no-any-return]


class Denoiser:
    """What a model draws with.

    Args:
        model: opened.
        compiled: compile it, if there is a compiler.
        notes: where it is said if there is none.
    """

    def __init__(self, model: opening.Opened, compiled: bool, notes: list[str]) -> None:
        self._model = model
        ready = all(fast.fits(network) for network in model.networks.values()) and bool(model.networks)
        self._fast = {name: fast.prepare(network) for name, network in model.networks.items()} if ready else {}
        self._run = fast.compiled(model.device, notes) if compiled and ready else fast.forward
        if compiled and not ready:
            notes.append("compiled has no effect: this model is not run by torch's own matrices")
        self._known: Recent[fast.Known] = Recent(KNOWN, fast.weight)

    def batch(self, prompts: Sequence[tuple[str, TextCond]], grid: tuple[float, ...], height: int, width: int) -> Any:
        """Prompts with their conditions, to be drawn together on a grid; latents are (B, 16, height, width)."""
        if self._model.velocity is not None:
            return Plain([self._model.velocity] * (len(grid) - 1), grid, TextCond.cat([cond for _, cond in prompts]))
        names = [self._model.name_at(t) for t in grid[:-1]]
        if not self._fast:
            networks = {name: sd3.velocity(network) for name, network in self._model.networks.items()}
            return Plain([networks[name] for name in names], grid, TextCond.cat([cond for _, cond in prompts]))
        made = {
            name: fast.Batch(own, self._know(name, own, prompts, grid), height, width, self._run)
            for name, own in self._fast.items()
        }
        return made[names[0]] if len(made) == 1 else Turns([made[name] for name in names])

    def _know(
        self, name: str, own: fast.Fast, prompts: Sequence[tuple[str, TextCond]], grid: tuple[float, ...]
    ) -> list[fast.Known]:
        """What is known of prompts, in their order; of those that are new, computed together."""
        found = {words: self._known.get((name, words, grid)) for words, _ in prompts}
        new = {words: cond for words, cond in prompts if found[words] is None}
        if new:
            made = fast.know(own, grid[:-1], TextCond.cat(list(new.values())))
            for words, one in zip(new, made, strict=True):
                found[words] = one
                self._known.put((name, words, grid), one)
        return [known for words, _ in prompts if (known := found[words]) is not None]
