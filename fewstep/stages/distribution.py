"""Stage `distribution`: distribution matching with timestep sharing (SD3.5-Flash, stage 2).

One update: roll the student out on its grid without gradient; teach the proxy what the student makes of it;
then move the student at one grid step by the distribution-matching loss, an adversarial loss at the same points, and
a share of trajectory guidance. Stage `split` does the same with two students, each owning some of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep import grids, noise
from fewstep.conditioning import TextCond
from fewstep.data import trajectories
from fewstep.engine.checkpoint import Stateful
from fewstep.engine.ema import EMA
from fewstep.engine.loop import train
from fewstep.engine.optim import Optimizer
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity, interpolate
from fewstep.models import roles, sd3
from fewstep.objectives import distribution, proxy
from fewstep.solvers import Trajectory, renoising_rollout, rollout
from fewstep.stages import adversary, watch
from fewstep.stages.adversary import Adversary
from fewstep.stages.matching import Config
from fewstep.stages.trajectory import update as trajectory_update

INITIAL, PICK, RENOISE, TAU, REAL, PERTURB, MIX, NOISED, GRID = range(9)  # streams of addressed noise
SDE = 20  # one stream for each step of a rollout, from here on
PROXY = 100  # four streams for each proxy update, from here on


@dataclass(frozen=True, eq=False)
class Given:
    """What a refinement learns from.

    Attributes:
        proxy: where the proxy starts: the teacher's transformer, or the proxy that an earlier stage left.
        teacher: the teacher's velocity with guidance in it.
        stored: teacher trajectories, for trajectory guidance and as what heads take for real.
        encode: prompts to conditions.
        prompt_at: prompt of sample k.
        held_out: what the student is looked at with as it learns; None never looks.
    """

    proxy: SD3Transformer2DModel
    teacher: Velocity
    stored: trajectories.Trajectories
    encode: trajectories.Encode
    prompt_at: trajectories.PromptAt
    held_out: watch.HeldOut | None = None


def turns(grid: tuple[float, ...], branch_at: Callable[[float], str]) -> list[int]:
    """In which order grid steps are updated, to be repeated: branches take turns, and within each its steps do (ours).

    One branch goes through its steps: 0, 1, 2, 3. Of two, one owning step 3 alone, both get as many updates:
    0, 3, 1, 3, 2, 3.
    """
    owned: dict[str, list[int]] = {}
    for i, t in enumerate(grid[:-1]):
        owned.setdefault(branch_at(t), []).append(i)
    longest = max(len(steps) for steps in owned.values())
    return [steps[k % len(steps)] for k in range(longest) for steps in owned.values()]


def branched(networks: Mapping[str, SD3Transformer2DModel], branch_at: Callable[[float], str]) -> Velocity:
    """One velocity of several networks; a batch shares its time, which says whose turn it is."""
    velocities = {name: sd3.velocity(network, fast_dtype()) for name, network in networks.items()}
    return lambda x_t, t, cond: velocities[branch_at(float(t[0]))](x_t, t, cond)


def student_rollout(
    state: State, config: Config, shape: torch.Size, grid: tuple[float, ...], cond: TextCond, rows: range
) -> Trajectory:
    """The student's own way from noise (B, 16, H, W) to samples, without gradient."""
    start = noise.normal(shape, seed=config.seed, index=rows, step=INITIAL)
    velocity = branched(state.students, state.branch_at)

    def fresh(i: int) -> Tensor:
        return noise.normal(shape, seed=config.seed, index=rows, step=SDE + i)

    with torch.no_grad():
        if config.rollout == "sde":
            return renoising_rollout(velocity, start, grid, cond, fresh)
        return rollout(velocity, start, grid, cond)


def proxy_update(
    network: SD3Transformer2DModel, path: Trajectory, cond: TextCond, config: Config, rows: range, number: int
) -> tuple[Tensor, Tensor]:
    """The proxy's losses on a rollout of the student, (B,), and their times (B,); gradient reaches the proxy alone.

    `number` counts the proxy's updates within one of the student: each has its own times, steps and noise.
    """
    stream, shape = PROXY + 4 * number, path.x.shape[2:]

    def at(offset: int) -> dict[str, Any]:
        return {"seed": config.seed, "index": rows, "step": stream + offset}

    t = grids.logit_normal(noise.normal((), **at(0)), config.t_mean, config.t_std)
    eps, u = noise.normal(shape, **at(1)), noise.uniform((), **at(2))
    steps = noise.integers(0, len(path.v), **at(3))
    given = proxy.pair(config.proxy_target, path, steps, t, eps, u, config.proxy_spread)
    return proxy.loss(sd3.velocity(network, fast_dtype()), given, cond), given.tau


def student_update(
    student: SD3Transformer2DModel,
    network: SD3Transformer2DModel,
    teacher: Velocity,
    x_i: Tensor,
    i: int,
    grid: tuple[float, ...],
    cond: TextCond,
    config: Config,
    rows: range,
) -> distribution.DMResult:
    """Distribution matching for grid step `i` from states `x_i` (B, 16, H, W), against the proxy `network`.

    Gradient reaches the student alone.
    """
    t_i, t_next = torch.full((len(x_i),), grid[i]), torch.full((len(x_i),), grid[i + 1])
    v = sd3.velocity(student, fast_dtype())(x_i, t_i, cond)

    def fresh() -> Tensor:
        return noise.normal(x_i.shape[1:], seed=config.seed, index=rows, step=RENOISE)

    u = noise.uniform((), seed=config.seed, index=rows, step=TAU)
    against = None if config.against == "student" else sd3.velocity(network, fast_dtype())
    return distribution.loss(config.switches, teacher, against, x_i, t_i, t_next, v, cond, fresh, u, grid)


def step_input(
    config: Config, given: Given, path: Trajectory, i: int, cond: TextCond, real: tuple[Tensor, TextCond], rows: range
) -> tuple[Tensor, TextCond]:
    """Where the student's step starts, (B, 16, H, W), and its conditions: the rollout's state, or noised data.

    Args:
        config: settings.
        given: what the stage learns from.
        path: the student's rollout, made under `cond`.
        i: grid step.
        cond: conditions of the rollout.
        real: teacher-made latents and their conditions.
        rows: sample numbers.
    """
    draw = noise.uniform((), seed=config.seed, index=rows[:1], step=MIX)
    if config.rollout == "noised_data" or (config.rollout == "mix" and bool(draw < 0.5)):
        eps = noise.normal(real[0].shape[1:], seed=config.seed, index=rows, step=NOISED)
        return interpolate(real[0], eps, torch.full((len(eps),), path.grid[i])), real[1]
    return path.x[i], cond


def update_grid(config: Config, grid: tuple[float, ...], rows: range) -> tuple[float, ...]:
    """The times of an update: the student's own, or a grid of as many steps drawn for this update."""
    if not config.random_grid or len(grid) < 3:
        return grid
    uniforms = noise.uniform((len(grid) - 2,), seed=config.seed, index=rows[:1], step=GRID)[0]
    return grids.random_grid(uniforms.tolist())


def adversarial_update(
    heads: Adversary, matched: distribution.DMResult, cond: TextCond, real: tuple[Tensor, TextCond], config: Config, rows: range
) -> tuple[Tensor, dict[str, Tensor]]:
    """Teach the heads at the points that were matched, and give the student's adversarial loss there.

    Args:
        heads: the adversary.
        matched: what `student_update` gave; its points are the fake ones.
        cond: conditions of the student's samples.
        real: teacher-made latents x0 (B, 16, H, W) and their conditions; noised here to the same times.
        config: settings.
        rows: sample numbers, addresses of the noise.

    Returns:
        The student's loss (B,), whose gradient reaches the student alone; and figures. The gradient of the heads' own
        loss has been added to the heads (and, if `joint`, to the proxy).
    """
    shape = matched.x_tau.shape[1:]
    noised = interpolate(real[0], noise.normal(shape, seed=config.seed, index=rows, step=REAL), matched.tau)
    eps = noise.normal(shape, seed=config.seed, index=rows, step=PERTURB) if heads.config.r1_weight > 0 else noised
    learned = adversary.discriminator_update(heads, (noised, real[1]), (matched.x_tau, cond), matched.tau, eps)
    learned["loss"].backward()
    heads.optimizer.step(rows.start, config.images)
    loss = adversary.student_loss(heads, matched.x_tau, matched.tau, cond)
    return loss, {
        "heads_loss": learned["loss"].detach(),
        "heads_real": learned["real"],
        "heads_fake": learned["fake"],
        "adversarial_loss": loss.detach().mean(),
    }


def run(
    config: Config, start: SD3Transformer2DModel, given: Given, work: Path, metrics: Path
) -> State:
    """Refine a copy of `start`: its average is `students["student"]` of what is returned, beside the proxy as it ended.

    Args:
        config: settings.
        start: the student after trajectory guidance.
        given: teacher, its trajectories, prompts.
        work: folder for checkpoints.
        metrics: the run's metrics.jsonl.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when a loss is not finite.
    """
    return refine(config, {"student": start}, lambda t: "student", given, "distribution", work, metrics)


def refine(
    config: Config,
    starts: Mapping[str, SD3Transformer2DModel],
    branch_at: Callable[[float], str],
    given: Given,
    stage: str,
    work: Path,
    metrics: Path,
) -> State:
    """Refine copies of one or several students that share the work by time; on return the students are the averages.

    Args:
        config: settings.
        starts: where each student starts, by name.
        branch_at: which student owns the step that starts at a time.
        given, work, metrics: as in `run`.
        stage: name in the log.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when a loss is not finite.
        health.Sick: the run is sick, and `health.action` is "stop".
    """
    state = begin(config, starts, branch_at, given)
    student = branched(state.students, branch_at)
    watcher = watch.Watcher(config, given.held_out, stage, metrics)

    def step(seen: int) -> dict[str, float]:
        figures = update(state, config, given, seen)
        watcher.record.add(figures)
        return figures

    def look(seen: int) -> bool:
        return watcher.look(seen, state.students, state.averages, student, state.proxy, given.teacher)

    state.images = train(
        step,
        state.parts() | {"health": watcher.record},
        stage=stage,
        total_images=config.images - config.images % config.batch,
        images_per_step=config.batch,
        work=work,
        metrics=metrics,
        log_every=1,  # grid steps take turns: every fourth row would show one of them alone
        look=look,
    )
    if watcher.rolled_back:
        state.images = int(watcher.nearest()["images"])
    for name, network in state.students.items():
        state.averages[name].copy_to({"student": network})
        network.requires_grad_(False)
    state.proxy.requires_grad_(False)
    return state


@dataclass(eq=False)
class State:
    """All that an update changes, and what it needs to know of the branches.

    Attributes:
        students, optimizers, averages: by branch.
        proxy, proxy_optimizer: the proxy, one for all branches.
        heads: the adversary, or None.
        branch_at: which branch owns the step that starts at a time.
        order: grid steps in the order of updates, repeated.
        stored_cond: conditions of the stored trajectories.
        images: student samples in the updates that the averages have seen; known when `refine` returns.
    """

    students: dict[str, SD3Transformer2DModel]
    optimizers: dict[str, Optimizer]
    averages: dict[str, EMA]
    proxy: SD3Transformer2DModel
    proxy_optimizer: Optimizer
    heads: Adversary | None
    branch_at: Callable[[float], str]
    order: list[int]
    stored_cond: TextCond
    images: int = 0

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        parts: dict[str, Stateful] = {"proxy": self.proxy, "proxy_optimizer": self.proxy_optimizer}
        if self.heads is not None:
            parts |= {"heads": self.heads.heads, "heads_optimizer": self.heads.optimizer}
        for name, network in self.students.items():
            parts |= {name: network, f"{name}_optimizer": self.optimizers[name], f"{name}_ema": self.averages[name]}
        return parts


def begin(
    config: Config, starts: Mapping[str, SD3Transformer2DModel], branch_at: Callable[[float], str], given: Given
) -> State:
    """The state before the first update; arguments as in `refine`."""
    students = {name: roles.trainable_copy(network) for name, network in starts.items()}
    proxy = roles.trainable_copy(given.proxy)
    return State(
        students=students,
        optimizers={name: Optimizer(network.named_parameters(), config.optim) for name, network in students.items()},
        averages={name: EMA({"student": network}, config.ema_half_life_images) for name, network in students.items()},
        proxy=proxy,
        proxy_optimizer=Optimizer(proxy.named_parameters(), config.proxy_optim),
        heads=Adversary(config.adversary, proxy, config.seed) if config.adversary.weight > 0 else None,
        branch_at=branch_at,
        order=turns(given.stored.grid, branch_at),
        stored_cond=given.encode(given.stored.prompts),
    )


def update(state: State, config: Config, given: Given, seen: int) -> dict[str, float]:
    """One update of proxy, heads and the student whose turn it is. SD3.5-Flash, stage 2; order ours.

    Args:
        state: changed in place.
        config: settings.
        given: teacher, its trajectories, prompts.
        seen: images before this update; the address of all its noise.

    Returns:
        Figures for the log.
    """
    rows = range(seen, seen + config.batch)
    grid = update_grid(config, given.stored.grid, rows)
    cond = given.encode([given.prompt_at(k) for k in rows])
    path = student_rollout(state, config, given.stored.x.shape[2:], grid, cond, rows)
    figures: dict[str, Tensor] = {}
    for number in range(config.proxy_updates):
        learned, times = proxy_update(state.proxy, path, cond, config, rows, number)
        learned.mean().backward()
        state.proxy_optimizer.step(seen, config.images)
        figures |= by_time(learned.detach(), times)
    i = state.order[(seen // config.batch) % len(state.order)]
    name = state.branch_at(grid[i])
    student = state.students[name]
    pick = noise.integers(0, len(given.stored.prompts), seed=config.seed, index=rows, step=PICK)
    real = given.stored.x[pick, -1], state.stored_cond[pick]
    x_i, cond = step_input(config, given, path, i, cond, real, rows)
    matched = student_update(student, state.proxy, given.teacher, x_i, i, grid, cond, config, rows)
    loss = (0.0 if i in config.skip_matching else 1.0) * matched.loss.mean()
    if config.trajectory_weight > 0:
        anchored = trajectory_update(student, given.stored, state.stored_cond, pick, torch.full_like(pick, i)).mean()
        loss = loss + config.trajectory_weight * anchored
        figures["trajectory_loss"] = anchored.detach()
    if state.heads is not None and i not in config.skip_adversary:
        state.heads.renew(seen)
        adversarial_loss, of_heads = adversarial_update(state.heads, matched, cond, real, config, rows)
        if config.adversary.joint:
            state.proxy_optimizer.step(seen, config.images)
        loss = loss + config.adversary.weight * adversarial_loss.mean()
        figures |= of_heads
        figures["heads"] = (of_heads["heads_real"] + of_heads["heads_fake"]) / 2
    loss.backward()
    norm = state.optimizers[name].step(seen, config.images)
    state.averages[name].update(seen, config.batch)
    if config.ida < 1:
        roles.align(state.proxy, student, config.ida)
    if i not in config.skip_matching:
        figures[f"move_{i}"] = matched.move.mean()
    figures |= {
        f"direction_{i}": matched.direction.abs().mean(),
        f"normaliser_{i}": matched.normaliser.mean(),
        "clipped": (matched.normaliser <= config.normaliser_floor).float().mean(),
        "grad_norm": norm,
        "sample_mean": path.x[-1].mean(),
        "sample_std": path.x[-1].std(),
    }
    return {key: float(value) for key, value in figures.items()}


def by_time(losses: Tensor, times: Tensor) -> dict[str, Tensor]:
    """The proxy's mean loss, and the same by thirds of t; a third without samples is left out."""
    third = (3 * times).long().clamp(max=2)
    parts = {f"proxy_loss_{name}": losses[third == k] for k, name in enumerate(("low", "mid", "high"))}
    return {"proxy_loss": losses.mean(), **{name: part.mean() for name, part in parts.items() if len(part)}}
