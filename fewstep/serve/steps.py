"""The denoiser of a model as batches that are asked for velocities step by step, with what is known of each prompt kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity
from fewstep.models import sd3
from fewstep.serve import fast, opening
from fewstep.serve.text import Recent

KNOWN = 2**28  # bytes of what is known of prompts
TIMES = 64  # steps up to which what is known of a prompt is kept: longer grids are computed in parts of so many, and let go


class Plain:
    """Prompts that are drawn together by a velocity that takes whole conditions, such as another runtime's."""

    def __init__(self, velocities: Sequence[Velocity], grid: Sequence[float], cond: TextCond) -> None:
        self._velocities, self._grid, self._cond = velocities, grid, cond

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """Of latents (B, 16, H, W) at the start of a step, from 0."""
        return self._velocities[step](x, torch.full((len(x),), self._grid[step]), self._cond)


class Run(NamedTuple):
    """Steps one after another that the same denoiser makes: its name, and the times at which they start."""

    name: str
    times: tuple[float, ...]


def runs(names: Sequence[str], times: Sequence[float], most: int) -> list[Run]:
    """Steps as runs of at most so many."""
    found: list[Run] = []
    for name, t in zip(names, times, strict=True):
        if not found or found[-1].name != name or len(found[-1].times) == most:
            found.append(Run(name, ()))
        found[-1] = Run(name, (*found[-1].times, t))
    return found


class Turns:
    """Batches of which each makes a run of steps: those of a split student's branches, or parts of a long grid.

    Args:
        parts: the runs.
        make: a run's batch; only that of the step at hand is held.
    """

    def __init__(self, parts: Sequence[Run], make: Callable[[Run], Any]) -> None:
        self._places = [(part, own) for part, run in enumerate(parts) for own in range(len(run.times))]
        self._parts, self._make = parts, make
        self._held: tuple[int, Any] = (-1, None)

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """As `Plain.velocity`."""
        part, own = self._places[step]
        if self._held[0] != part:
            self._held = (-1, None)  # let go of the one before first
            self._held = (part, self._make(self._parts[part]))
        return self._held[1].velocity(x, own)  # type: ignore[no-any-return]


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
        kept, parts = len(grid) - 1 <= TIMES, runs(names, grid[:-1], TIMES)

        def make(run: Run) -> fast.Batch:
            return fast.Batch(self._fast[run.name], self._know(run, prompts, kept), height, width, self._run)

        return make(parts[0]) if len(parts) == 1 else Turns(parts, make)

    def _know(self, run: Run, prompts: Sequence[tuple[str, TextCond]], kept: bool) -> list[fast.Known]:
        """What is known of prompts, in their order; of those that are new, computed together."""
        found = {words: self._known.get((run, words)) for words, _ in prompts}
        new = {words: cond for words, cond in prompts if found[words] is None}
        if new:
            made = fast.know(self._fast[run.name], run.times, TextCond.cat(list(new.values())))
            for words, one in zip(new, made, strict=True):
                found[words] = one
                if kept:
                    self._known.put((run, words), one)
        return [known for words, _ in prompts if (known := found[words]) is not None]
