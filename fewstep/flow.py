"""Rectified flow: the one place where the convention is stated.

    t in [0, 1]: t = 1 is noise, t = 0 is data
    x_t = (1 - t) x0 + t eps          v = dx_t/dt = eps - x0
    x0_hat = x_t - t v                eps_hat = x_t + (1 - t) v
    score(x_t, t) = -eps_hat / t      (only if v is the conditional mean under independent noise)

`t` is always (B,) and float32 or wider: in bfloat16 the numbers 0.898 and 0.9 are the same, so a narrower `t`
is refused. States may have any trailing shape and float type; results are float32 or wider, because `t` is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Any], Tensor]
"""velocity(x_t, t, cond) -> v: x_t and v are (B, ...), t is (B,), cond is whatever the model reads."""


def wide(x: Tensor) -> Tensor:
    """Returns `x` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_wide(t: Tensor, name: str = "t") -> None:
    """Refuses times (or the numbers they are made of) held in less than float32.

    Raises:
        TypeError: `t` is bfloat16, float16 or not a float.
    """
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} is {t.dtype}, but times need float32 or wider: pass {name}.float()")


def expand_t(t: Tensor, like: Tensor) -> Tensor:
    """Reshapes `t` (B,) to (B, 1, ..., 1) so that it multiplies `like` (B, ...).

    Raises:
        TypeError: `t` is narrower than float32.
        ValueError: `t` is not (B,) with the batch size of `like`.
    """
    check_wide(t)
    if t.ndim != 1 or like.ndim < 1 or t.shape[0] != like.shape[0]:
        raise ValueError(f"t must be (B,), one time per sample: t {tuple(t.shape)}, x {tuple(like.shape)}")
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps. x0, eps: (B, ...); t: (B,) in [0, 1]."""
    s = expand_t(t, x0)
    return (1 - s) * x0 + s * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """v = dx_t/dt = eps - x0, (B, ...), float32 or wider."""
    return wide(eps) - wide(x0)


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0_hat = x_t - t v."""
    return x_t - expand_t(t, x_t) * v


def eps_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """eps_hat = x_t + (1 - t) v."""
    return x_t + (1 - expand_t(t, x_t)) * v


def score_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """score = -(x_t + (1 - t) v) / t. Needs t > 0; holds for a conditional-mean velocity (Tweedie)."""
    return -eps_from_velocity(x_t, v, t) / expand_t(t, x_t)


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / t. Needs t > 0."""
    return (x_t - x0) / expand_t(t, x_t)


def velocity_from_eps(x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """v = (eps - x_t) / (1 - t). Needs t < 1."""
    return (eps - x_t) / (1 - expand_t(t, x_t))


def velocity_from_score(x_t: Tensor, score: Tensor, t: Tensor) -> Tensor:
    """v = -(x_t + t score) / (1 - t). Needs t < 1."""
    s = expand_t(t, x_t)
    return -(x_t + s * score) / (1 - s)
