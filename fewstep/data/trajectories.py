"""Teacher trajectories in shards: the states where a guided teacher stands at the student's grid points.

One shard is one WebDataset tar file of a few dozen trajectories that appears by a rename once it is whole, so that a
killed run goes on with the next shard. State and noise of trajectory k depend on (seed, k) alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.data import shards
from fewstep.engine import ranks
from fewstep.engine.log import Progress
from fewstep.flow import Velocity, expand_t
from fewstep.objectives import trajectory
from fewstep.solvers import Solver, stepper

PromptAt = Callable[[int], str]
Encode = Callable[[Sequence[str]], TextCond]
SHARD = 64
INITIAL = 0  # stream of the initial noise


@dataclass(frozen=True)
class Trajectories:
    """States at the S + 1 grid points, and the prompts they were made for.

    Attributes:
        samples: K of them, float32 (S + 1, 16, H, W); they stay on the disk until they are looked at.
        prompts: of all K trajectories.
        grid: the S + 1 times.
    """

    samples: tuple[Tensor, ...]
    prompts: list[str]
    grid: tuple[float, ...]

    @property
    def x(self) -> Tensor:
        """All states (K, S + 1, 16, H, W) in memory: for sets that are small."""
        return torch.stack(self.samples)

    @property
    def latent_shape(self) -> torch.Size:
        """(16, H, W)."""
        return self.samples[0].shape[1:]

    def state(self, rows: Tensor, steps: Tensor) -> Tensor:
        """States (B, 16, H, W) of trajectories `rows` (B,) at grid points `steps` (B,)."""
        return torch.stack([self.samples[row][step] for row, step in zip(rows.tolist(), steps.tolist(), strict=True)])

    def pair(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target of student steps: x_i and the teacher's average velocity to the next grid point.

        Args:
            rows: (B,) trajectory numbers.
            steps: (B,) grid steps i.

        Returns:
            x_i (B, 16, H, W) and target of the same shape, as `objectives.trajectory.target` gives it.
        """
        grid = torch.tensor(self.grid)
        x_i, x_next = self.state(rows, steps), self.state(rows, steps + 1)
        return x_i, (x_next - x_i) / expand_t(grid[steps + 1] - grid[steps], x_i)


@torch.no_grad()
def write(
    folder: Path,
    teacher: Velocity,
    encode: Encode,
    prompt_at: PromptAt,
    *,
    grid: tuple[float, ...],
    latent_shape: tuple[int, int, int],
    count: int,
    substeps: int,
    solver: Solver,
    seed: int,
    title: str = "teacher trajectories",
) -> None:
    """Roll the teacher out from `count` noises; shards that are already whole are kept.

    Args:
        folder: target; holds only shards of one setting (the caller names it after the settings).
        teacher: velocity with guidance in it.
        encode: prompts to conditions.
        prompt_at: prompt of trajectory k.
        grid: student grid.
        latent_shape: (16, H, W).
        count: trajectories.
        substeps: teacher steps in each student step.
        solver: of the teacher.
        seed: of the initial noise.
        title: on the progress line.

    Raises:
        OSError: when the folder cannot be written or the disk is full; whole shards stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress: Progress | None = None  # shown only when something is made
    for first in range(ranks.rank() * SHARD, count, ranks.count() * SHARD):  # processes take turns
        rows = range(first, min(first + SHARD, count))
        path = folder / f"{first:07d}-{len(rows):03d}.tar"
        if not path.exists():
            progress = progress or Progress(title, count, first)
            prompts = [prompt_at(k) for k in rows]
            cond, x = encode(prompts), noise.normal(latent_shape, seed=seed, index=rows, step=INITIAL)
            states, step = [x], stepper(solver)
            for t_cur, t_next in zip(grid[:-1], grid[1:], strict=True):
                t0, t1 = torch.full((len(rows),), t_cur), torch.full((len(rows),), t_next)
                mean_velocity = trajectory.target(teacher, x, t0, t1, cond, substeps, step)
                x = x + (t_next - t_cur) * mean_velocity
                states.append(x)
            about = [json.dumps({"prompt": prompt, "grid": grid}, ensure_ascii=False).encode() for prompt in prompts]
            parts = zip(rows, torch.stack(states, dim=1), about, strict=True)
            shards.write(path, ((f"{k:07d}", {"npy": shards.packed(own), "json": told}) for k, own, told in parts))
        if progress:
            progress.show(rows.stop)
    if progress:
        progress.close()
    ranks.wait()


def read(folder: Path, count: int, grid: tuple[float, ...]) -> Trajectories:
    """The first `count` trajectories of a folder.

    Raises:
        ValueError: when shards are missing or damaged, or were made for another grid.
    """
    samples, prompts = [], []
    for first in range(0, count, SHARD):
        rows = range(first, min(first + SHARD, count))
        path = folder / f"{first:07d}-{len(rows):03d}.tar"
        if not path.exists():
            raise ValueError(f"{path} is missing: stage `trajectory` makes it; run the same command again")
        found = shards.read(path)
        try:
            own = [found[f"{k:07d}"] for k in rows]
            about = [json.loads(shards.raw(parts["json"])) for parts in own]
            samples += [shards.unpacked(parts["npy"]) for parts in own]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, it is made again") from error
        if tuple(about[0]["grid"]) != grid:
            raise ValueError(f"{path} was made for the grid {about[0]['grid']}, not {list(grid)}; choose another --out")
        prompts += [told["prompt"] for told in about]
    return Trajectories(tuple(samples), prompts, grid)
