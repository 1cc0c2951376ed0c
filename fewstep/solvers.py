"""Samplers as functions of (velocity, x, grid). No scheduler object.

A deterministic step has the form x_next = x + (t_next - t_cur) v: for Euler v is the velocity at x, for Heun
the mean of the velocities at both ends, for Adams-Bashforth what the velocities here and a step ago let expect
of the middle. A re-noising step keeps nothing of x but its data prediction. States are float32 or wider. NFE is
calls times `velocity.nfe_per_call`, which is 1 where absent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.flow import Velocity, expand_t, interpolate, wide, x0_from_velocity
from fewstep.grids import check_grid

Solver = Literal["euler", "heun", "ab2"]
CALLS: dict[Solver, int] = {"euler": 1, "heun": 2, "ab2": 1}  # of the velocity in a step
Step = Callable[[Velocity, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]]


def euler_step(
    velocity: Velocity, x: Tensor, t_cur: Tensor, t_next: Tensor, cond: Any
) -> tuple[Tensor, Tensor]:
    """One Euler step from t_cur (B,) to t_next (B,): first order, one call. Returns (x_next, v), as x."""
    v = velocity(x, t_cur, cond)
    return x + expand_t(t_next - t_cur, x) * v, v


def heun_step(
    velocity: Velocity, x: Tensor, t_cur: Tensor, t_next: Tensor, cond: Any
) -> tuple[Tensor, Tensor]:
    """One Heun step from t_cur (B,) to t_next (B,): second order, two calls. Returns (x_next, mean v), as x.

    Samples that land on t = 0 take an Euler step (networks are not trained at 0; a whole rollout stays second
    order), so a batch that lands there entirely costs one call.
    """
    x_euler, v_cur = euler_step(velocity, x, t_cur, t_next, cond)
    at_zero = t_next == 0
    if bool(at_zero.all()):
        return x_euler, v_cur
    v_next = velocity(x_euler, t_next, cond)
    v = torch.where(at_zero.reshape(-1, *[1] * (x.ndim - 1)), v_cur, (v_cur + v_next) / 2)
    return x + expand_t(t_next - t_cur, x) * v, v


def adams_bashforth() -> Step:
    """A step of second order and one call (Adams-Bashforth), for one trajectory: it remembers the velocity of its last call.

    With r the length of this step over that of the last one, v = v_cur + r (v_cur - v_last) / 2. The first step, and those
    that land on t = 0 (as Heun's), are Euler steps; a whole rollout stays second order.
    """
    last: list[tuple[Tensor, Tensor]] = []

    def step(velocity: Velocity, x: Tensor, t_cur: Tensor, t_next: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        v_cur, length = velocity(x, t_cur, cond), t_next - t_cur
        v = v_cur
        if last:
            v_last, length_last = last.pop()
            half = torch.where(t_next == 0, torch.zeros_like(length), length / length_last / 2)
            v = v_cur + expand_t(half, x) * (v_cur - v_last)
        last.append((v_cur, length))
        return x + expand_t(length, x) * v, v

    return step


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States along a rollout.

    Attributes:
        x: (S + 1, B, ...), x[0] the start and x[-1] the sample.
        v: (S, B, ...), the velocity each step moved along: x[i + 1] = x[i] + (grid[i + 1] - grid[i]) v[i];
            of a re-noising rollout, the velocity at x[i].
        grid: S + 1 times.
        nfe: network evaluations per sample.
    """

    x: Tensor
    v: Tensor
    grid: tuple[float, ...]
    nfe: int


def rollout(
    velocity: Velocity, x: Tensor, grid: Sequence[float], cond: Any, solver: Solver = "euler"
) -> Trajectory:
    """Integrates from grid[0] to grid[-1] = 0 and keeps every state. Differentiable unless under no_grad.

    Args:
        velocity: velocity(x_t, t, cond).
        x: (B, ...), the state at time grid[0] (pure noise if that is 1).
        grid: S + 1 decreasing times ending at 0.
        cond: handed to `velocity` unchanged.
        solver: "euler", "heun" or "ab2".

    Raises:
        ValueError: bad grid or unknown solver.
    """
    step, times, x = stepper(solver), check_grid(grid), wide(x)
    counted = _Counted(velocity)
    xs, vs = [x], []
    for t_cur, t_next in zip(times[:-1], times[1:], strict=True):
        x, v = step(counted, x, _full(t_cur, x), _full(t_next, x), cond)
        xs.append(x)
        vs.append(v)
    return Trajectory(torch.stack(xs), torch.stack(vs), times, counted.nfe)


def renoising_rollout(
    velocity: Velocity, x: Tensor, grid: Sequence[float], cond: Any, noise: Callable[[int], Tensor]
) -> Trajectory:
    """SDE rollout: every step goes to its data prediction and back up with fresh noise (DMD2).

    x0_hat = x_i - t_i v(x_i, t_i), then x_{i+1} = (1 - t_{i+1}) x0_hat + t_{i+1} eps_i. The last step stays
    at x0_hat. Unlike along `rollout`, a state's noise is independent of what the state was made from.

    Args:
        velocity: velocity(x_t, t, cond).
        x: (B, ...), the state at time grid[0] (pure noise if that is 1).
        grid: S + 1 decreasing times ending at 0.
        cond: handed to `velocity` unchanged.
        noise: noise(i) gives eps_i (B, ...), standard normals, for the step that starts at grid[i]; the last
            step asks for none.

    Raises:
        ValueError: bad grid, or noise of another shape than the state's.
    """
    times, x = check_grid(grid), wide(x)
    counted = _Counted(velocity)
    xs, vs = [x], []
    for i, (t_cur, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = counted(x, _full(t_cur, x), cond)
        x0_hat = x0_from_velocity(x, v, _full(t_cur, x))
        x = x0_hat if t_next == 0 else interpolate(x0_hat, _shaped(noise(i), x), _full(t_next, x))
        xs.append(x)
        vs.append(v)
    return Trajectory(torch.stack(xs), torch.stack(vs), times, counted.nfe)


def integrate(
    velocity: Velocity,
    x: Tensor,
    t_from: Tensor,
    t_to: Tensor,
    cond: Any,
    substeps: int,
    solver: Solver | Step = "euler",
) -> Tensor:
    """Integrates each sample from its own t_from to its own t_to in `substeps` uniform steps.

    Args:
        velocity: velocity(x_t, t, cond).
        x: (B, ...), the states at t_from.
        t_from: (B,), float32 or wider.
        t_to: (B,), float32 or wider.
        cond: handed to `velocity` unchanged.
        substeps: at least 1.
        solver: "euler", "heun" or "ab2"; or a step of `stepper`, which then knows where the trajectory comes from.

    Returns:
        (B, ...), the states at t_to.

    Raises:
        ValueError: `substeps` < 1, unknown solver, or times that are not (B,).
        TypeError: times narrower than float32.
    """
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    step, x = stepper(solver) if isinstance(solver, str) else solver, wide(x)
    t_cur = t_from
    for k in range(1, substeps + 1):
        # the last time is t_to itself: rounding must not turn 0 into 1e-9
        t_next = t_to if k == substeps else t_from + (t_to - t_from) * (k / substeps)
        x, _ = step(velocity, x, t_cur, t_next, cond)
        t_cur = t_next
    return x


class _Counted:
    """A velocity that counts its network evaluations."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.nfe = velocity, 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.nfe += int(getattr(self.velocity, "nfe_per_call", 1))
        return self.velocity(x_t, t, cond)


def _full(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def _shaped(eps: Tensor, x: Tensor) -> Tensor:
    if eps.shape != x.shape:
        raise ValueError(f"noise must have the state's shape {tuple(x.shape)}, got {tuple(eps.shape)}")
    return eps


def stepper(solver: Solver) -> Step:
    """The step of a solver, to be used along one trajectory.

    Raises:
        ValueError: unknown solver.
    """
    steps: dict[str, Step] = {"euler": euler_step, "heun": heun_step, "ab2": adams_bashforth()}
    if solver not in steps:
        raise ValueError(f"unknown solver {solver!r}: one of {', '.join(steps)}")
    return steps[solver]


def in_chunks(velocity: Velocity, size: int) -> Velocity:
    """The same velocity, at most `size` samples at a time: for what is asked without gradient, in little memory."""

    def call(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        rows = [slice(i, i + size) for i in range(0, len(x_t), size)]
        return torch.cat([velocity(x_t[r], t[r], cond[r]) for r in rows])

    return call
