"""Flow matching: the loss that trains teachers, and the proxy on the student's samples."""

from typing import Any

from torch import Tensor

from fewstep.flow import Velocity, interpolate, velocity_target, wide


def loss(
    velocity: Velocity, x0: Tensor, eps: Tensor, t: Tensor, cond: Any, weight: Tensor | None = None
) -> Tensor:
    """|| v(x_t, t, c) - (eps - x0) ||^2, mean over elements, in float32 or wider.

    Args:
        velocity: velocity(x_t, t, cond), with gradient.
        x0: (B, ...) data. For the proxy: the student's samples, detached.
        eps: (B, ...) standard normals.
        t: (B,) in [0, 1], float32 or wider.
        cond: handed to `velocity` unchanged.
        weight: (B,) factor on each sample's loss; None is 1.

    Returns:
        (B,), one loss per sample.

    Raises:
        TypeError: `t` is narrower than float32.
    """
    v = velocity(interpolate(x0, eps, t), t, cond)
    error = (wide(v) - velocity_target(x0, eps)).square().flatten(1).mean(1)
    return error if weight is None else weight * error
