"""How many bits each matrix of a student gets, and a short training that makes up for what they cost.

The paper has 8- and 6-bit students and does not say how they were made; all of this is ours. A student visits few times, so a
matrix is judged by what its rounding does to the velocity at those times and at the student's own states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.engine.checkpoint import Stateful
from fewstep.engine.log import Progress
from fewstep.engine.loop import train
from fewstep.engine.optim import Optim, Optimizer
from fewstep.models import roles, sd3, widths
from fewstep.solvers import Trajectory, rollout

INITIAL, PICK, STEP = 0, 1, 2  # streams of addressed noise
FOLLOWS = {"to_k": "to_q", "to_v": "to_q", "add_k_proj": "add_q_proj", "add_v_proj": "add_q_proj"}

Round = Callable[[Tensor, int], Tensor]
"""A matrix after its round trip through so many bits, as the format that is written stores it."""


@dataclass(frozen=True)
class Config:
    """How a student is rounded.

    Attributes:
        bits: of every matrix that is rounded: 8, 6 or 4.
        average: bits of an average matrix, say 6.0, spent where they matter most among `choices`; 0 gives all `bits`.
        choices: widths that `average` is spent on.
        kept: modules that stay at 16 bits, names or patterns with `*`.
        recover: samples of fine-tuning the rounded student against the unrounded one; 0 is none.
        batch: samples in an update, and those that matrices are judged by.
        seed: of noise and prompts.
        optim: optimiser of the fine-tuning.
    """

    bits: int = 8
    average: float = 0.0
    choices: tuple[int, ...] = (4, 6, 8)
    kept: tuple[str, ...] = widths.KEPT
    recover: int = 0
    batch: int = 32
    seed: int = 11
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, betas=(0.9, 0.99), final_lr_ratio=0.05))

    def __post_init__(self) -> None:
        wrong = [b for b in (self.bits, *self.choices) if b not in widths.CHOICES]
        if wrong:
            raise ValueError(f"{wrong[0]} bits: give one of {', '.join(map(str, widths.CHOICES))}")
        if self.average and not min(self.choices) <= self.average <= max(self.choices):
            raise ValueError(
                f"average = {self.average:g} bits lies outside of choices {sorted(self.choices)}: give one between"
            )
        if self.recover < 0 or self.batch < 1:
            raise ValueError(f"recover = {self.recover}, batch = {self.batch}: samples cannot be negative, nor a batch empty")
        if 0 < self.recover < self.batch:
            raise ValueError(f"recover = {self.recover} is less than one update of {self.batch} (batch)")


def groups(network: nn.Module, kept: Sequence[str]) -> dict[str, list[str]]:
    """Matrices that get the same width, by the first of them: queries, keys and values are one matrix in most formats."""
    made: dict[str, list[str]] = {}
    for name in widths.matrices(network, kept):
        parent, _, last = name.rpartition(".")
        made.setdefault(f"{parent}.{FOLLOWS.get(last, last)}", []).append(name)
    return made


def own_states(
    network: SD3Transformer2DModel, grid: tuple[float, ...], cond: TextCond, latent: tuple[int, ...], rows: range, seed: int
) -> Trajectory:
    """The states that a student visits from addressed noise, and its velocities there."""
    start = noise.normal(latent, seed=seed, index=rows, step=INITIAL)
    with torch.no_grad():
        return rollout(sd3.velocity(network), start, grid, cond)


@torch.no_grad()
def sensitivity(
    network: SD3Transformer2DModel, path: Trajectory, cond: TextCond, rounded: Round, config: Config
) -> dict[str, dict[int, float]]:
    """What rounding one group of matrices costs: mean squared change of the velocity over its mean square.

    Measured at the student's own states, averaged over its steps, one group at a time.

    Args:
        network: the student; as it was when this returns.
        path: its states and velocities (see `own_states`).
        cond: their conditions.
        rounded: the format's round trip.
        config: widths and what is kept.

    Returns:
        {group: {bits: cost}}.
    """
    velocity, modules = sd3.velocity(network), dict(network.named_modules())
    found: dict[str, dict[int, float]] = {}
    there = [torch.full((len(cond),), t) for t in path.grid[:-1]]
    square = float(path.v.square().mean())
    members = groups(network, config.kept)
    progress = Progress("sensitivity", len(members))
    for number, (group, names) in enumerate(members.items(), 1):
        kept = {name: modules[name].weight.data for name in names}
        found[group] = {}
        for bits in config.choices:
            for name, weight in kept.items():
                modules[name].weight.data = rounded(weight, bits).to(weight)
            moved = torch.stack([velocity(x, t, cond) for x, t in zip(path.x[:-1], there, strict=True)])
            found[group][bits] = float((moved - path.v).square().mean()) / square
        for name, weight in kept.items():
            modules[name].weight.data = weight
        progress.show(number)
    progress.close()
    return found


def spend(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: float) -> dict[str, int]:
    """Widths of groups, `average` bits in all, spent where a bit saves most.

    Starts with the least width everywhere and widens, one group at a time, the one whose cost falls most for each bit that it
    takes, as long as the budget lasts. Costs are taken to add up.

    Args:
        costs: {group: {bits: cost}}, see `sensitivity`.
        sizes: weights in each group.
        average: bits an average weight may have.

    Raises:
        ValueError: the least width is already more.
    """
    ladder = {group: sorted(options) for group, options in costs.items()}
    chosen = {group: options[0] for group, options in ladder.items()}
    budget = average * sum(sizes.values())
    spent = sum(chosen[group] * sizes[group] for group in chosen)
    if spent > budget:
        raise ValueError(f"average = {average:g} bits is less than the least width, {min(chosen.values())}")
    while True:
        best: tuple[float, str, int] | None = None
        for group, options in ladder.items():
            for wider in options[options.index(chosen[group]) + 1 :]:
                price = (wider - chosen[group]) * sizes[group]
                if spent + price <= budget:
                    saved = (costs[group][chosen[group]] - costs[group][wider]) / price
                    best = max(best, (saved, group, wider)) if best else (saved, group, wider)
        if best is None or best[0] <= 0:
            return chosen
        _, group, wider = best
        spent += (wider - chosen[group]) * sizes[group]
        chosen[group] = wider


def plan(
    network: SD3Transformer2DModel, path: Trajectory, cond: TextCond, rounded: Round, config: Config
) -> tuple[widths.Widths, dict[str, dict[int, float]]]:
    """The width of each matrix, and what widths cost where that was asked for (else nothing)."""
    if not config.average:
        return widths.uniform(network, config.bits, config.kept), {}
    members, modules = groups(network, config.kept), dict(network.named_modules())
    costs = sensitivity(network, path, cond, rounded, config)
    sizes = {group: sum(modules[name].weight.numel() for name in names) for group, names in members.items()}
    chosen = spend(costs, sizes, config.average)
    return {name: chosen[group] for group, names in members.items() for name in names}, costs


class Straight(nn.Module):
    """A weight that is rounded on the way forth and taken for itself on the way back (straight-through)."""

    def __init__(self, rounded: Round, bits: int) -> None:
        super().__init__()
        self.rounded, self.bits = rounded, bits

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, with the gradient of the weight."""
        return weight + (self.rounded(weight.detach(), self.bits).to(weight) - weight.detach())


def recover(
    config: Config,
    network: SD3Transformer2DModel,
    planned: Mapping[str, int],
    rounded: Round,
    grid: tuple[float, ...],
    latent: tuple[int, ...],
    cond_at: Callable[[range], TextCond],
    work: Path,
    metrics: Path,
) -> SD3Transformer2DModel:
    """Fine-tune a student so that its rounded self does what it did: one step of its own way, by mean squared error.

    Args:
        config: settings.
        network: the student, unrounded: what is imitated.
        planned: widths by name.
        rounded: the format's round trip.
        grid, latent: what it draws.
        cond_at: conditions of samples by number.
        work, metrics: as in other stages; a run that was killed goes on.

    Returns:
        A student whose weights are still unrounded: the format rounds them as it did in training.
    """
    student = copy.deepcopy(network).requires_grad_(True)
    modules = dict(student.named_modules())
    for name, bits in planned.items():
        parametrize.register_parametrization(modules[name], "weight", Straight(rounded, bits), unsafe=True)
    optimizer = Optimizer(student.named_parameters(), config.optim)
    exact, learner = sd3.velocity(network), sd3.velocity(student)

    def step(seen: int) -> dict[str, float]:
        rows = range(seen, seen + config.batch)
        cond = cond_at(rows)
        path = own_states(network, grid, cond, latent, rows, config.seed)
        number = int(noise.integers(0, len(grid) - 1, seed=config.seed, index=rows[:1], step=STEP))
        t = torch.full((len(rows),), grid[number])
        with torch.no_grad():
            truth = exact(path.x[number], t, cond)
        loss = (learner(path.x[number], t, cond) - truth).square().mean() / truth.square().mean()
        loss.backward()
        return {"loss": float(loss.detach()), "grad_norm": float(optimizer.step(seen, config.recover))}

    total = config.recover - config.recover % config.batch
    parts: dict[str, Stateful] = {"student": roles.Trained(student), "optimizer": optimizer}
    train(step, parts, stage="recover", total_images=total, images_per_step=config.batch, work=work, metrics=metrics)
    for name in planned:
        parametrize.remove_parametrizations(modules[name], "weight", leave_parametrized=False)
    return student.requires_grad_(False).eval()
