"""Distribution matching where the truth is known: a ring of eight unequal Gaussians, an exact teacher, a small student.

    python examples/ring2d.py --out runs/ring2d           # a few minutes on a CPU
    python examples/ring2d.py --out runs/ring2d --quick   # fewer updates: directions, not numbers

Every arm starts from the same student and gets as many updates. What is measured is the energy distance (x 1000) of
samples to data, and of the states in between to the true marginals: a student whose samples are right may pass through
states that no teacher knows. DIR gets `ring2d.md` (the table), `ring2d.json` (the same, with settings) and a picture of
each arm. One training seed an arm unless `--seeds` says more: read the table for directions.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep import grids
from fewstep.engine.ema import EMA
from fewstep.evaluate.distances import energy_distance
from fewstep.flow import interpolate
from fewstep.objectives import distribution, flow_matching, proxy, trajectory
from fewstep.objectives.distribution import Switches
from fewstep.solvers import Trajectory, renoising_rollout, rollout
from fewstep.worlds.mixture import GaussianMixture

BATCH = 512
MEASURED = 4096
TG = 0.3  # share of trajectory guidance where an arm keeps it


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: also the name of its picture.
        switches: what is matched, and where.
        rollout: how the student is sampled in training, and when it is measured.
        target: what the proxy learns.
        trajectory_weight: share of trajectory guidance kept.
    """

    name: str
    switches: Switches
    rollout: proxy.Rollout = "deterministic"
    target: proxy.Target = "A"
    trajectory_weight: float = 0.0


ARMS = (
    Arm("end point, deterministic", Switches(anchor="end"), target="A"),
    Arm("end point, SDE (DMD2)", Switches(anchor="end"), "sde", "A"),
    Arm("timestep sharing", Switches()),
    Arm("timestep sharing + trajectory", Switches(), trajectory_weight=TG),
    Arm("sub-interval proxy (C)", Switches(delta=1.0, tau_law="below"), target="C"),
    Arm(
        "implicit Euler, no proxy (D)",
        Switches(against="student", last_step="own_noise", tau_law="below"),
        target="D",
    ),
)


class Velocity(nn.Module):
    """A small velocity network: (B, 2) and (B,) to (B, 2); the condition is not read."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(4))
        self.layers = nn.Sequential(
            nn.Linear(2 + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        """Velocity at x (B, 2) and t (B,)."""
        phases = t[:, None] * self.frequencies
        return self.out(self.layers(torch.cat([x, t[:, None], phases.sin(), phases.cos()], dim=1)))


def ring() -> GaussianMixture:
    """Eight Gaussians on a circle of radius 1.5, of unequal weights and widths."""
    angle = torch.arange(8) * math.pi / 4
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(means, torch.linspace(0.06, 0.16, 8), torch.linspace(1.0, 3.0, 8))


def teacher_states(world: GaussianMixture, grid: tuple[float, ...], count: int, substeps: int = 16) -> Tensor:
    """States (S + 1, count, 2) of the exact teacher from noise at the student's grid points."""
    x = torch.randn(count, 2)
    states = [x]
    for t_cur, t_next in zip(grid[:-1], grid[1:], strict=True):
        v = trajectory.target(world.velocity, x, torch.full((count,), t_cur), torch.full((count,), t_next), None, substeps)
        x = x + (t_next - t_cur) * v
        states.append(x)
    return torch.stack(states)


def trajectory_loss(student: Velocity, states: Tensor, grid: tuple[float, ...]) -> Tensor:
    """Trajectory guidance on a batch of stored pairs, each at a grid step of its own; scalar."""
    rows, steps = torch.randint(states.shape[1], (BATCH,)), torch.randint(len(grid) - 1, (BATCH,))
    times = torch.tensor(grid)
    x, t, t_next = states[steps, rows], times[steps], times[steps + 1]
    target = (states[steps + 1, rows] - x) / (t_next - t)[:, None]
    return trajectory.loss(student, x, t, target, None).mean()


def warm_start(states: Tensor, grid: tuple[float, ...], updates: int) -> Velocity:
    """A student that learned the teacher's average velocity over each of its steps (stage 1)."""
    student = Velocity()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        optimizer.zero_grad()
        trajectory_loss(student, states, grid).backward()
        optimizer.step()
        schedule.step()
    return student


def start_proxy(world: GaussianMixture, updates: int) -> Velocity:
    """A proxy that starts as the teacher, learned by flow matching on data."""
    network = Velocity()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        optimizer.zero_grad()
        t = grids.logit_normal(torch.randn(BATCH))
        flow_matching.loss(network, world.sample(BATCH), torch.randn(BATCH, 2), t, None).mean().backward()
        optimizer.step()
        schedule.step()
    return network


def sampled(student: Velocity, arm: Arm, grid: tuple[float, ...], count: int) -> Trajectory:
    """The student's rollout in the arm's way, without gradient."""
    with torch.no_grad():
        x = torch.randn(count, 2)
        if arm.rollout == "sde":
            return renoising_rollout(student, x, grid, None, lambda i: torch.randn(count, 2))
        return rollout(student, x, grid, None)


def train(
    arm: Arm, world: GaussianMixture, start: Velocity, fake: Velocity, states: Tensor, grid: tuple[float, ...], updates: int
) -> Velocity:
    """Stage 2 of one arm; returns the averaged student."""
    student, fake = copy.deepcopy(start), copy.deepcopy(fake)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.0, 0.999), weight_decay=0.0)
    fake_optimizer = torch.optim.AdamW(fake.parameters(), lr=5e-4, betas=(0.0, 0.999), weight_decay=0.0)
    average = EMA({"student": student}, 138.0 * BATCH)  # a decay of .995 an update
    for update in range(updates):
        path = sampled(student, arm, grid, BATCH)
        for _ in range(5 if arm.target != "D" else 0):
            fake_optimizer.zero_grad()
            t, steps = grids.logit_normal(torch.randn(BATCH)), torch.randint(len(grid) - 1, (BATCH,))
            given = proxy.pair(arm.target, path, steps, t, torch.randn(BATCH, 2), torch.rand(BATCH))
            proxy.loss(fake, given, None).mean().backward()
            fake_optimizer.step()
        optimizer.zero_grad()
        i = update % (len(grid) - 1)
        t_i, t_next = torch.full((BATCH,), grid[i]), torch.full((BATCH,), grid[i + 1])
        x_i, eps, u = path.x[i], torch.randn(BATCH, 2), torch.rand(BATCH)
        matched = distribution.loss(
            arm.switches, world.velocity, fake, x_i, t_i, t_next, student(x_i, t_i), None, eps, u, grid
        )
        loss = matched.loss.mean()
        if arm.trajectory_weight > 0:
            loss = loss + arm.trajectory_weight * trajectory_loss(student, states, grid)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        average.update(update * BATCH, BATCH)
    average.copy_to({"student": student})
    return student


def measure(world: GaussianMixture, path: Trajectory) -> list[float]:
    """Energy distance x 1000 of the states at every grid point after the start, the sample last."""
    distances = []
    for x, t in zip(path.x[1:], path.grid[1:], strict=True):
        truth = interpolate(world.sample(MEASURED), torch.randn(MEASURED, 2), torch.full((MEASURED,), t))
        distances.append(1000 * energy_distance(x, truth)[0])
    return distances


def picture(world: GaussianMixture, path: Trajectory, distances: list[float], title: str, file: Path) -> None:
    """Clouds at every grid point, truth in grey beneath."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(distances)
    figure, axes = plt.subplots(1, columns, figsize=(3.1 * columns, 3.5), squeeze=False, layout="constrained")
    for k, axis in enumerate(axes[0]):
        t = path.grid[k + 1]
        truth = interpolate(world.sample(1500), torch.randn(1500, 2), torch.full((1500,), t))
        axis.scatter(*truth.T.numpy(), s=5, c="#b8b8b8", linewidths=0, label="truth")
        axis.scatter(*path.x[k + 1][:1500].T.numpy(), s=5, c="#c2410c", alpha=0.55, linewidths=0, label="student")
        axis.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"t = {t:g}     distance {distances[k]:.1f}", fontsize=9)
    axes[0][0].legend(loc="upper left", fontsize=8, frameon=False, markerscale=2)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def study(steps: int, seed: int, updates: int, out: Path) -> list[dict[str, object]]:
    """All arms on one grid with one training seed; rows of the table."""
    torch.manual_seed(1000 * steps + seed)
    world, grid = ring(), grids.STUDENT_GRIDS[steps]
    states = teacher_states(world, grid, 16_384)
    start, fake = warm_start(states, grid, max(400, updates)), start_proxy(world, max(400, updates))
    rows: list[dict[str, object]] = []
    for arm in (None, *ARMS):
        begun = time.perf_counter()
        torch.manual_seed(seed)
        name = arm.name if arm else "start: trajectory guidance alone"
        student = train(arm, world, start, fake, states, grid, updates) if arm else start
        torch.manual_seed(77)
        path = sampled(student, arm or ARMS[2], grid, MEASURED)
        distances = measure(world, path)
        took = time.perf_counter() - begun
        rows.append({"steps": steps, "arm": name, "seed": seed, "distances": distances, "seconds": round(took, 1)})
        file = f"{steps}-step-{name.replace(' ', '-').replace(',', '').replace(':', '').replace('+', 'and')}-{seed}.png"
        picture(world, path, distances, f"{name}, {steps} steps, {updates if arm else 0} updates", out / file)
        print(f"{steps} steps, seed {seed}  {name:36} {'  '.join(f'{d:7.1f}' for d in distances)}   {took:.0f} s", flush=True)
    return rows


def table(rows: list[dict[str, object]], updates: int) -> str:
    """The rows as Markdown, seeds side by side."""
    lines = [
        f"Energy distance x 1000 to the truth (0 is perfect; finite samples add about ±1), {updates:,} updates.",
        "Several seeds stand side by side. `examples/ring2d.py` made this.",
        "",
    ]
    for steps in sorted({int(str(r["steps"])) for r in rows}, reverse=True):
        times = grids.STUDENT_GRIDS[steps][1:]
        lines += [f"| {steps} steps | {' | '.join(f't = {t:g}' for t in times)} |", "|---" * (len(times) + 1) + "|"]
        mine = [r for r in rows if r["steps"] == steps]
        for arm in dict.fromkeys(str(r["arm"]) for r in mine):
            seeds = [r["distances"] for r in mine if r["arm"] == arm]
            cells = [" / ".join(f"{d[k]:.1f}" for d in seeds) for k in range(len(times))]  # type: ignore[index]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run the study and write table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ring2d"), help="folder of table and pictures")
    parser.add_argument("--quick", action="store_true", help="400 updates instead of 2,000")
    parser.add_argument("--updates", type=int, help="student updates of each arm")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds of each arm")
    parser.add_argument("--steps", type=int, nargs="+", choices=(2, 4), default=(4, 2), help="student grids")
    given = parser.parse_args()
    updates = given.updates or (400 if given.quick else 2000)
    if updates < 1 or given.seeds < 1:
        parser.error("--updates and --seeds must be at least 1")
    given.out.mkdir(parents=True, exist_ok=True)
    rows = [row for steps in given.steps for seed in range(given.seeds) for row in study(steps, seed, updates, given.out)]
    record = {"updates": updates, "batch": BATCH, "measured": MEASURED, "rows": rows}
    (given.out / "ring2d.json").write_text(json.dumps(record, indent=1) + "\n")
    (given.out / "ring2d.md").write_text(table(rows, updates))
    print(f"\n{table(rows, updates)}\n{given.out / 'ring2d.md'}")


if __name__ == "__main__":
    main()
