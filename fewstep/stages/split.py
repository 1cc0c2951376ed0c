"""Stage `split`: two copies of the student, one for early and one for late times, refined side by side (stage 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import SD3Transformer2DModel

from fewstep.stages import distribution, refinement
from fewstep.stages.branches import HIGH, LOW, branch_at


@dataclass(frozen=True)
class Config:
    """How the branches are refined; all else is as in stage `distribution`.

    Attributes:
        images: student samples used in updates of either branch.
        boundary: the low branch owns steps that start at or below it, the high branch the others (paper: 0.5).
        ema_decay: of each branch's average, per update of that branch (paper: 0.99).
        lr_scale: learning rates relative to stage `distribution` (ours).
        seed: of noise and prompts.
        skip: leave out stages `split` and `merge`: the student of stage `distribution` is the result.
    """

    images: int = 3_200
    boundary: float = 0.5
    ema_decay: float = 0.99
    lr_scale: float = 0.5
    seed: int = 3
    skip: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.boundary < 1:
            raise ValueError(f"boundary must lie between 0 and 1, got {self.boundary}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")


def owners(grid: tuple[float, ...], boundary: float) -> dict[str, tuple[float, ...]]:
    """Starting times of the steps that each branch owns; together they are the grid's, once."""
    owner = branch_at(boundary)
    return {name: tuple(t for t in grid[:-1] if owner(t) == name) for name in (LOW, HIGH)}


def idle(grid: tuple[float, ...], boundary: float) -> str:
    """Why there is nothing to split, in a sentence; empty where both branches own a step.

    With the grid (1, .75, 0) no step starts at or below .5: a low branch would never be trained nor used, and the high
    branch alone would only be a longer stage `distribution`.
    """
    empty = [name for name, times in owners(grid, boundary).items() if not times]
    if not empty:
        return ""
    side = "at or below" if empty[0] == LOW else "above"
    reason = (
        f"no step of the grid {grid} starts {side} split.boundary = {boundary}: nothing to split, the student of stage "
        "`distribution` is kept"
    )
    if len(grid) < 3:  # a single step: no boundary splits it
        return reason
    between = (grid[-3] + grid[-2]) / 2
    return f"{reason}. A boundary between two starting times, such as {between:g}, splits this grid"


def settings(config: Config, stage2: distribution.Config) -> distribution.Config:
    """The settings of stage `distribution` that the branches are refined with."""
    updates = math.log(0.5) / math.log(config.ema_decay) if config.ema_decay > 0 else 0.0
    return replace(
        stage2,
        images=config.images,
        seed=config.seed,
        ema_half_life_images=max(2 * updates * stage2.batch, 1e-6),  # the branches take turns: two updates move both
        optim=replace(stage2.optim, lr=config.lr_scale * stage2.optim.lr),
        proxy_optim=replace(stage2.proxy_optim, lr=config.lr_scale * stage2.proxy_optim.lr),
    )


def run(
    config: Config,
    stage2: distribution.Config,
    start: SD3Transformer2DModel,
    given: distribution.Given,
    work: Path,
    metrics: Path,
) -> distribution.State:
    """Refine two copies of `start`: their averages are the `students` "low" and "high". SD3.5-Flash, stage 3.

    Rollouts use the branch that owns each step; one proxy, which goes on from `given.proxy`, serves both.

    Args:
        config: settings.
        stage2: settings of stage `distribution`.
        start: the student after it.
        given: teacher, trajectories, prompts, and the proxy that stage `distribution` left.
        work: folder for checkpoints.
        metrics: the run's metrics.jsonl.

    Raises:
        ValueError: a branch without a step, a budget below one update, or a checkpoint of another stage.
        FloatingPointError: a loss is not finite.
    """
    reason = idle(given.stored.grid, config.boundary)
    if reason:
        raise ValueError(reason)
    starts = {LOW: start, HIGH: start}
    return refinement.refine(
        settings(config, stage2), starts, branch_at(config.boundary), given, "split", work, metrics
    )
