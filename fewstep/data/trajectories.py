"""Teacher trajectories in shards: the states where a guided teacher stands at the student's grid points.

One shard is one WebDataset tar file of a few dozen trajectories that appears by a rename once it is whole, so that a
killed run goes on with the next shard. State and noise of trajectory k depend on (seed, k) alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
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
NEAR = 4 * 2**30
INITIAL = 0  # stream of the initial noise


@dataclass(frozen=True)
class Trajectories:
    """States at the S + 1 grid points, and the prompts they were made for.

    Attributes:
        samples: K of them, float32 (S + 1, 16, H, W); they stay on the disk until they are looked at.
        prompts: of all K trajectories.
        grid: the S + 1 times.
        near: all of them (K, S + 1, 16, H, W) on the GPU that is trained on, if they are few or small.
    """

    samples: tuple[Tensor, ...]
    prompts: list[str]
    grid: tuple[float, ...]
    near: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """All states (K, S + 1, 16, H, W) in memory: for sets that are small."""
        return torch.stack(self.samples)

    @property
    def latent_shape(self) -> torch.Size:
        """(16, H, W)."""
        return self.samples[0].shape[1:]

    def state(self, rows: Tensor, steps: Tensor) -> Tensor:
        """States (B, 16, H, W) of trajectories `rows` (B,) at grid points `steps` (B,), where these are."""
        if self.near is not None:
            return self.near[rows, steps]
        found = [self.samples[row][step] for row, step in zip(rows.tolist(), steps.tolist(), strict=True)]
        return torch.stack(found).to(rows.device)

    def beside(self, device: torch.device) -> Trajectories:
        """The same, with all states on the device where that is a GPU and they take at most `NEAR` bytes."""
        size = len(self.samples) * self.samples[0].numel() * self.samples[0].itemsize
        return replace(self, near=self.x.to(device)) if device.type != "cpu" and size <= NEAR else self

    def pair(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target of student steps: x_i and the teacher's average velocity to the next grid point.

        Args:
            rows: (B,) trajectory numbers.
            steps: (B,) grid steps i.

        Returns:
            x_i (B, 16, H, W) and target of the same shape, as `objectives.trajectory.target` gives it.
        """
        grid = torch.tensor(self.grid, device=steps.device)
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
    device: torch.device = noise.CPU,
    together: int = 1,
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
        device: where states are while they are made.
        together: shards that are made at once.

    Raises:
        OSError: when the folder cannot be written or the disk is full; whole shards stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards_of = range(ranks.rank() * SHARD, count, ranks.count() * SHARD)  # processes take turns
    missing = [rows for first in shards_of if not _path(folder, rows := range(first, min(first + SHARD, count))).exists()]
    progress = Progress(title, count, missing[0].start) if missing else None  # shown only when something is made
    for at in range(0, len(missing), together):
        made = missing[at : at + together]
        numbers = [k for part in made for k in part]
        prompts = [prompt_at(k) for k in numbers]
        cond, x = encode(prompts), noise.normal(latent_shape, seed=seed, index=numbers, step=INITIAL).to(device)
        states, step = [x], stepper(solver)
        for t_cur, t_next in zip(grid[:-1], grid[1:], strict=True):
            t0, t1 = (torch.full((len(numbers),), t, device=device) for t in (t_cur, t_next))
            mean_velocity = trajectory.target(teacher, x, t0, t1, cond, substeps, step)
            x = x + (t_next - t_cur) * mean_velocity
            states.append(x)
        about = [json.dumps({"prompt": prompt, "grid": grid}, ensure_ascii=False).encode() for prompt in prompts]
        parts = zip(numbers, torch.stack(states, dim=1).cpu(), about, strict=True)
        for own in made:
            of_shard = islice(parts, len(own))
            shards.write(_path(folder, own), ((f"{k:07d}", {"npy": shards.packed(x), "json": told}) for k, x, told in of_shard))
        if progress:
            progress.show(made[-1].stop)
    if progress:
        progress.close()
    ranks.wait()


def _path(folder: Path, rows: range) -> Path:
    """The shard of some trajectories."""
    return folder / f"{rows.start:07d}-{len(rows):03d}.tar"


def read(folder: Path, count: int, grid: tuple[float, ...]) -> Trajectories:
    """The first `count` trajectories of a folder.

    Raises:
        ValueError: when shards are missing or damaged, or were made for another grid.
    """
    samples, prompts = [], []
    for first in range(0, count, SHARD):
        rows = range(first, min(first + SHARD, count))
        path = _path(folder, rows)
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
