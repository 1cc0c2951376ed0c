"""Stage `distribution`: distribution matching with timestep sharing (SD3.5-Flash, stage 2).

One update: roll the student out on its grid without gradient; teach the proxy what the student makes of it;
then move the student at one grid step by the distribution-matching loss, an adversarial loss at the same points, and
a share of trajectory guidance. Stage `split` does the same with two students, each owning some of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep import grids, noise
from fewstep.conditioning import TextCond
from fewstep.data import embeddings, trajectories
from fewstep.engine import ranks
from fewstep.engine.checkpoint import Stateful
from fewstep.engine.ema import EMA
from fewstep.engine.loop import microbatches
from fewstep.engine.optim import Optimizer
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity, interpolate
from fewstep.models import roles, sd3
from fewstep.objectives import distribution, proxy
from fewstep.solvers import Trajectory, renoising_rollout, rollout
from fewstep.stages import adversary, watch
from fewstep.stages.adversary import Adversary
from fewstep.stages.branches import branched, turns
from fewstep.stages.encoders import Reads, everything, whole
from fewstep.stages.matching import Config
from fewstep.stages.trajectory import update as trajectory_update

INITIAL, PICK, RENOISE, TAU, REAL, PERTURB, MIX, NOISED, GRID = range(9)  # streams of addressed noise
ADAPTER = 10  # the weights that a proxy's new adapters start from
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
        trained: what of student and proxy is trained.
        reads: what of a condition the student is given in an update; teacher and proxy are given all.
        always: what it is given when it is looked at.
    """

    proxy: SD3Transformer2DModel
    teacher: Velocity
    stored: trajectories.Trajectories
    encode: trajectories.Encode
    prompt_at: trajectories.PromptAt
    held_out: watch.HeldOut | None = None
    trained: roles.Config = roles.FULL
    reads: Reads = everything
    always: Callable[[TextCond], TextCond] = whole


def student_rollout(
    state: State, config: Config, shape: torch.Size, grid: tuple[float, ...], cond: TextCond, rows: range
) -> Trajectory:
    """The student's own way from noise (B, 16, H, W) to samples, without gradient."""
    device = sd3.home(state.proxy)
    start = noise.normal(shape, seed=config.seed, index=rows, step=INITIAL, device=device)
    velocity = branched(state.students, state.branch_at)

    def fresh(i: int) -> Tensor:
        return noise.normal(shape, seed=config.seed, index=rows, step=SDE + i, device=device)

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
        return {"seed": config.seed, "index": rows, "step": stream + offset, "device": path.x.device}

    t = grids.logit_normal(noise.normal((), **at(0)), config.t_mean, config.t_std)
    eps, u = noise.normal(shape, **at(1)), noise.uniform((), **at(2))
    steps = noise.integers(0, len(path.v), **at(3))
    given = proxy.pair(config.proxy_target, path, steps, t, eps, u, config.proxy_spread)
    return proxy.loss(sd3.velocity(network, fast_dtype(sd3.home(network))), given, cond), given.tau


def student_update(
    student: SD3Transformer2DModel,
    network: SD3Transformer2DModel,
    teacher: Velocity,
    x_i: Tensor,
    i: int,
    grid: tuple[float, ...],
    cond: TextCond,
    read: TextCond,
    config: Config,
    rows: range,
) -> distribution.DMResult:
    """Distribution matching for grid step `i` from states `x_i` (B, 16, H, W), against the proxy `network`.

    Teacher and proxy are given `cond`, the student `read`. Gradient reaches the student alone.
    """
    t_i, t_next, v, fresh, u = _step(student, x_i, i, grid, read, config, rows)
    against = None if config.against == "student" else sd3.velocity(network, fast_dtype(sd3.home(network)))
    return distribution.loss(config.switches, teacher, against, x_i, t_i, t_next, v, cond, fresh, u, grid)


def student_points(
    student: SD3Transformer2DModel, x_i: Tensor, i: int, grid: tuple[float, ...], read: TextCond, config: Config, rows: range
) -> distribution.Points:
    """The points at which `student_update` matches, without asking teacher or proxy; no gradient."""
    with torch.no_grad():
        t_i, t_next, v, fresh, u = _step(student, x_i, i, grid, read, config, rows)
        return distribution.points(config.switches, x_i, t_i, t_next, v, fresh, u, grid)


def _step(
    student: SD3Transformer2DModel, x_i: Tensor, i: int, grid: tuple[float, ...], read: TextCond, config: Config, rows: range
) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor], Tensor]:
    """Times of grid step `i`, the student's velocity at its start, and the randomness of what follows."""
    t_i, t_next = (torch.full((len(x_i),), t, device=x_i.device) for t in (grid[i], grid[i + 1]))
    v = sd3.velocity(student, fast_dtype(sd3.home(student)))(x_i, t_i, read)

    def fresh() -> Tensor:
        return noise.normal(x_i.shape[1:], seed=config.seed, index=rows, step=RENOISE, device=x_i.device)

    return t_i, t_next, v, fresh, noise.uniform((), seed=config.seed, index=rows, step=TAU, device=x_i.device)


def step_input(
    config: Config, path: Trajectory, i: int, cond: TextCond, real: tuple[Tensor, TextCond], rows: range, mixed: bool
) -> tuple[Tensor, TextCond]:
    """Where the student's step starts, (B, 16, H, W), and its conditions: the rollout's state, or noised data.

    Args:
        config: settings.
        path: the student's rollout, made under `cond`.
        i: grid step.
        cond: conditions of the rollout.
        real: teacher-made latents and their conditions.
        rows: sample numbers.
        mixed: whether an update that may use either takes noised data.
    """
    if config.rollout == "noised_data" or (config.rollout == "mix" and mixed):
        eps = noise.normal(real[0].shape[1:], seed=config.seed, index=rows, step=NOISED, device=real[0].device)
        return interpolate(real[0], eps, torch.full((len(eps),), path.grid[i], device=eps.device)), real[1]
    return path.x[i], cond


def update_grid(config: Config, grid: tuple[float, ...], rows: range) -> tuple[float, ...]:
    """The times of an update: the student's own, or a grid of as many steps drawn for this update."""
    if not config.random_grid or len(grid) < 3:
        return grid
    uniforms = noise.uniform((len(grid) - 2,), seed=config.seed, index=rows[:1], step=GRID)[0]
    return grids.random_grid(uniforms.tolist())


@dataclass(frozen=True, eq=False)
class Part:
    """A microbatch of an update.

    Attributes:
        rows: sample numbers, addresses of all noise.
        cond: conditions of the student's samples.
        path: its own way from noise under them, without gradient.
        pick: stored trajectories, for trajectory guidance and as what heads take for real.
    """

    rows: range
    cond: TextCond
    path: Trajectory
    pick: Tensor


def heads_update(
    heads: Adversary,
    points: list[tuple[distribution.Points | distribution.DMResult, TextCond, tuple[Tensor, TextCond], range]],
    config: Config,
    seen: int,
) -> dict[str, Tensor]:
    """Teach the heads at the points that are matched; the proxy too, if `joint`.

    Args:
        heads: the adversary.
        points: of each microbatch: the student's points, which are the fake ones, conditions of its samples, teacher-made
            latents x0 (B, 16, H, W) with theirs (noised here to the same times), sample numbers.
        config: settings.
        seen: images before this update.

    Returns:
        Figures; the heads have made their step, and what `joint` gives the proxy has been added to its gradient.
    """
    found: list[tuple[int, dict[str, Tensor]]] = []
    for matched, cond, real, rows in points:
        shape = real[0].shape[1:]
        at: dict[str, Any] = {"seed": config.seed, "index": rows, "device": real[0].device}
        noised = interpolate(real[0], noise.normal(shape, step=REAL, **at), matched.tau)
        eps = noise.normal(shape, step=PERTURB, **at) if heads.config.r1_weight > 0 else noised
        learned = adversary.discriminator_update(heads, (noised, real[1]), (matched.x_tau, cond), matched.tau, eps)
        (learned["loss"] * (len(rows) / config.batch)).backward()
        found.append((len(rows), {name: value.detach() for name, value in learned.items()}))
    heads.optimizer.step(seen, config.images)
    share = torch.tensor([float(n) for n, _ in found]) / sum(n for n, _ in found)
    means = {f"heads_{name}": share @ torch.stack([told[name] for _, told in found]).cpu() for name in ("loss", "real", "fake")}
    return means | {"heads": (means["heads_real"] + means["heads_fake"]) / 2}


@dataclass(eq=False)
class State:
    """All that an update changes, and what it needs to know of the branches.

    Attributes:
        students, optimizers, averages: by branch.
        proxy, proxy_optimizer: the proxy, one for all branches.
        heads: the adversary, or None.
        branch_at: which branch owns the step that starts at a time.
        order: grid steps in the order of updates, repeated.
        stored_cond: conditions of stored trajectories, by number.
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
    stored_cond: Callable[[Tensor], TextCond]
    images: int = 0

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        parts: dict[str, Stateful] = {"proxy": roles.Trained(self.proxy), "proxy_optimizer": self.proxy_optimizer}
        if self.heads is not None:
            parts |= {"heads": self.heads.heads, "heads_optimizer": self.heads.optimizer}
        for name, network in self.students.items():
            parts |= {name: roles.Trained(network), f"{name}_optimizer": self.optimizers[name]}
            parts |= {f"{name}_ema": self.averages[name]}
        return parts


def begin(
    config: Config, starts: Mapping[str, SD3Transformer2DModel], branch_at: Callable[[float], str], given: Given
) -> State:
    """The state before the first update; arguments as in `refine`."""
    students = {name: roles.trainable(network, given.trained, config.seed) for name, network in starts.items()}
    proxy = roles.trainable(given.proxy, given.trained, noise.address(config.seed, 0, ADAPTER))
    small = given.trained.eight_bit_moments
    return State(
        students=students,
        optimizers={name: Optimizer(network.named_parameters(), config.optim, small) for name, network in students.items()},
        averages={name: EMA({"student": network}, config.ema_half_life_images) for name, network in students.items()},
        proxy=proxy,
        proxy_optimizer=Optimizer(proxy.named_parameters(), config.proxy_optim, small),
        heads=Adversary(config.adversary, proxy, config.seed) if config.adversary.weight > 0 else None,
        branch_at=branch_at,
        order=turns(given.stored.grid, branch_at),
        stored_cond=embeddings.conditions(given.encode, given.stored.prompts),
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
    parts = [sampled(state, config, given, grid, own) for own in microbatches(ranks.share(rows), config.micro_batch)]
    figures: dict[str, Tensor] = {}
    for number in range(config.proxy_updates):
        learned: list[tuple[Tensor, Tensor]] = []
        for part in parts:
            losses, times = proxy_update(state.proxy, part.path, part.cond, config, part.rows, number)
            (losses.sum() / config.batch).backward()
            learned.append((losses.detach(), times))
        state.proxy_optimizer.step(seen, config.images)
        figures |= by_time(*(torch.cat(both) for both in zip(*learned, strict=True)))
    i = state.order[(seen // config.batch) % len(state.order)]
    name = state.branch_at(grid[i])
    figures |= student_step(state, config, given, parts, i, grid, rows)
    norm = state.optimizers[name].step(seen, config.images)
    state.averages[name].update(seen, config.batch)
    if config.ida < 1:
        roles.align(state.proxy, state.students[name], config.ida)
    samples = torch.cat([part.path.x[-1] for part in parts])
    figures |= {"grad_norm": norm, "sample_mean": samples.mean(), "sample_std": samples.std()}
    return {key: float(value) for key, value in figures.items()}


def sampled(state: State, config: Config, given: Given, grid: tuple[float, ...], rows: range) -> Part:
    """The student's own samples of some rows, and which stored trajectories go with them."""
    cond = given.encode([given.prompt_at(k) for k in rows])
    path = student_rollout(state, config, given.stored.latent_shape, grid, given.reads(cond, rows), rows)
    device, known = path.x.device, len(given.stored.prompts)
    return Part(rows, cond, path, noise.integers(0, known, seed=config.seed, index=rows, step=PICK, device=device))


def student_step(
    state: State, config: Config, given: Given, parts: list[Part], i: int, grid: tuple[float, ...], rows: range
) -> dict[str, Tensor]:
    """Gradients of the student for grid step `i`, added up over microbatches; the heads learn on the way.

    Heads learn at points of the whole batch before the student meets them. With several microbatches the points are
    therefore made twice, first without gradient.
    """
    student = state.students[state.branch_at(grid[i])]
    heads = state.heads if i not in config.skip_adversary else None
    mixed = bool(noise.uniform((), seed=config.seed, index=rows[:1], step=MIX) < 0.5)
    last, inputs = len(grid) - 1, []
    for part in parts:
        real = given.stored.state(part.pick, torch.full_like(part.pick, last)), state.stored_cond(part.pick)
        x_i, cond = step_input(config, part.path, i, part.cond, real, part.rows, mixed)
        inputs.append((real, x_i, cond, given.reads(cond, part.rows)))

    def match(k: int) -> distribution.DMResult:
        _, x_i, cond, read = inputs[k]
        return student_update(student, state.proxy, given.teacher, x_i, i, grid, cond, read, config, parts[k].rows)

    figures: dict[str, Tensor] = {}
    whole = match(0) if len(parts) == 1 else None
    if heads is not None:
        heads.renew(rows.start)
        points = [
            (whole or student_points(student, x_i, i, grid, read, config, part.rows), cond, real, part.rows)
            for part, (real, x_i, cond, read) in zip(parts, inputs, strict=True)
        ]
        figures |= heads_update(heads, points, config, rows.start)
    made = []
    for k, part in enumerate(parts):
        matched_k = whole or match(k)
        loss = (0.0 if i in config.skip_matching else 1.0) * matched_k.loss.sum()
        told = {
            "move": matched_k.move,
            "direction": matched_k.direction.abs().flatten(1).mean(1),
            "normaliser": matched_k.normaliser,
            "clipped": (matched_k.normaliser <= config.normaliser_floor).float(),
        }
        if config.trajectory_weight > 0:
            at = torch.full_like(part.pick, i)
            anchored = trajectory_update(student, given.stored, given.reads(inputs[k][0][1], part.rows), part.pick, at)
            loss, told["trajectory_loss"] = loss + config.trajectory_weight * anchored.sum(), anchored.detach()
        if heads is not None:
            adversarial = adversary.student_loss(heads, matched_k.x_tau, matched_k.tau, inputs[k][2])
            loss, told["adversarial_loss"] = loss + config.adversary.weight * adversarial.sum(), adversarial.detach()
        (loss / config.batch).backward()
        made.append(told)
    if heads is not None and config.adversary.joint:
        state.proxy_optimizer.step(rows.start, config.images)
    means = {name: torch.cat([told[name] for told in made]).mean() for name in made[0]}
    if i in config.skip_matching:
        del means["move"]
    return figures | {f"{n}_{i}" if n in ("move", "direction", "normaliser") else n: value for n, value in means.items()}


def by_time(losses: Tensor, times: Tensor) -> dict[str, Tensor]:
    """The proxy's mean loss, and the same by thirds of t; a third without samples is left out."""
    third = (3 * times).long().clamp(max=2)
    parts = {f"proxy_loss_{name}": losses[third == k] for k, name in enumerate(("low", "mid", "high"))}
    return {"proxy_loss": losses.mean(), **{name: part.mean() for name, part in parts.items() if len(part)}}
