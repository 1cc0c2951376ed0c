"""Grids: the times a sampler visits, and the densities training times are drawn from.

A grid is a plain tuple of S + 1 numbers, strictly decreasing, ending at 0. Densities map given uniforms or
normals to times, so that randomness stays addressed (`noise.py`).
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fewstep.flow import check_wide

Time = TypeVar("Time", float, Tensor)

T_MIN = 1e-3
"""Smallest time `logit_normal` gives: the lowest of the 1000 noise levels of stock SD3. 1 is allowed."""

STUDENT_GRIDS: dict[int, tuple[float, ...]] = {4: (1.0, 0.9, 0.75, 0.5, 0.0), 2: (1.0, 0.75, 0.0)}
"""Default student grids: one shift of 3 of the uniform grid. Ours; the paper's numbers are not public."""


def shift(t: Time, s: float) -> Time:
    """t' = s t / (1 + (s - 1) t): moves times towards noise for s > 1. Shifts multiply: 3 after 3 is 9.

    Raises:
        ValueError: `s` is not positive.
        TypeError: `t` is a tensor narrower than float32.
    """
    if not s > 0:
        raise ValueError(f"shift must be positive, got {s} (1 is off)")
    if isinstance(t, Tensor):
        check_wide(t)
    return s * t / (s * t + (1 - t))  # in this form 1 maps to 1 exactly, never above


_shift = shift  # the functions below have an argument of the same name


def shifted_grid(num_steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """The uniform grid 1, ..., 1/num_steps, 0 shifted once: num_steps + 1 numbers.

    Raises:
        ValueError: `num_steps` < 1 or `shift` not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return check_grid([_shift(i / num_steps, shift) for i in range(num_steps, -1, -1)])


def random_grid(uniforms: Sequence[float], shift: float = 3.0, spread: float = 0.8) -> tuple[float, ...]:
    """A grid from 1 to 0 with random times between: for training rollouts (after CDM; the law is ours).

    Before the shift, interior time k = 1 .. N - 1, counted from data, is

        (1 - spread) k / N + spread u_(k)        u_(k): the k-th smallest of N - 1 uniforms

    Its mean is k / N, so grids scatter about `shifted_grid(N)`; neighbours stay (1 - spread) / N apart, so
    that no step is empty. spread = 0 is that grid itself.

    Args:
        uniforms: N - 1 numbers in [0, 1], in any order; none gives the one-step grid (1, 0).
        shift: as in `shifted_grid`.
        spread: in [0, 1).

    Raises:
        ValueError: a uniform outside [0, 1], `spread` outside [0, 1) or `shift` not positive.
    """
    if not 0 <= spread < 1:
        raise ValueError(f"spread must be in [0, 1), got {spread}: at 1 two times may coincide")
    ordered = sorted(float(u) for u in uniforms)
    if not all(0 <= u <= 1 for u in ordered):  # nan fails, too
        raise ValueError(f"uniforms must be in [0, 1], got {ordered}")
    num_steps = len(ordered) + 1
    inner = [(1 - spread) * k / num_steps + spread * u for k, u in enumerate(ordered, start=1)]
    return check_grid([_shift(t, shift) for t in [1.0, *reversed(inner), 0.0]])


def stock_twice_shifted_grid(num_steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """What the stock flow-matching Euler scheduler visits when only a number of steps is given.

    It stores its smallest noise level already shifted and shifts the whole grid again, so four steps of shift
    3 are (1, .858, .602, .009, 0) rather than (1, .9, .75, .5, 0). For parity with stock samplers only.

    Raises:
        ValueError: `num_steps` < 2 (the scheduler's last step is its smallest noise level).
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, got {num_steps}")
    low = _shift(1 / 1000, shift)  # stock SD3 counts 1000 noise levels
    once = [1 + (low - 1) * i / (num_steps - 1) for i in range(num_steps)]
    return check_grid([_shift(t, shift) for t in once] + [0.0])


def check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """Returns `grid` as a tuple of floats, or says what is wrong with it.

    Raises:
        ValueError: fewer than two times, a time outside [0, 1], not strictly decreasing, or not ending at 0.
    """
    times = tuple(float(t) for t in grid)
    if len(times) < 2:
        raise ValueError(f"a grid needs at least two times, got {times}")
    for i, t in enumerate(times):
        if not 0 <= t <= 1:
            raise ValueError(f"grid[{i}] = {t} is outside [0, 1]; times are not 0..1000: {times}")
    for i in range(1, len(times)):
        if not times[i] < times[i - 1]:
            raise ValueError(f"a grid strictly decreases, but {times[i]} follows {times[i - 1]}: {times}")
    if times[-1] != 0:
        raise ValueError(f"a grid ends at 0 (data), but this one ends at {times[-1]}: append 0.0")
    return times


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std n), clamped to [T_MIN, 1]: SD3's density. May be followed by `shift`.

    Args:
        normal: (B,) standard normals, float32 or wider.

    Raises:
        TypeError: `normal` is narrower than float32.
        ValueError: `std` is not positive.
    """
    check_wide(normal, "normal")
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    return torch.sigmoid(mean + std * normal).clamp(T_MIN, 1.0)


def uniform_t(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """t = low + (high - low) u for u (B,) in [0, 1). May be followed by `shift`.

    Raises:
        TypeError: `u` is narrower than float32.
        ValueError: not 0 <= low <= high <= 1.
    """
    check_wide(u, "u")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"need 0 <= low <= high <= 1, got low {low}, high {high}")
    return low + (high - low) * u
