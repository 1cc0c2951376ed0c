"""Classifier-free guidance: v = v_neg + w (v_pos - v_neg); w = 1 is off.

Some code bases write cond + w (cond - uncond); their w = 3 is our w = 4. Norm-preserving guidance turns the
velocity as guidance does, but keeps the length of v_pos.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity, expand_t, wide


def combine(v_neg: Tensor, v_pos: Tensor, w: float) -> Tensor:
    """v_neg + w (v_pos - v_neg), same shape. At w = 1 this is `v_pos` exactly, not up to rounding."""
    return v_pos if w == 1 else v_neg + w * (v_pos - v_neg)


def combine_keeping_norm(v_neg: Tensor, v_pos: Tensor, w: float) -> Tensor:
    """`combine`, rescaled sample by sample to the norm of `v_pos` over all its elements; float32 or wider.

    At w = 1 this is `v_pos` exactly. Guidance that cancels to zero stays zero.
    """
    if w == 1:
        return v_pos
    v_pos = wide(v_pos)
    v = combine(wide(v_neg), v_pos, w)
    norm, wanted = (torch.linalg.vector_norm(a.flatten(1), dim=1) for a in (v, v_pos))
    return v * expand_t(wanted / norm.clamp(min=torch.finfo(norm.dtype).tiny), v)


@dataclass(frozen=True)
class Guided:
    """A velocity with guidance built in; itself a velocity.

    Attributes:
        velocity: the plain velocity.
        neg_cond: the negative condition, batch of 1; None is the null condition (zeros).
        scale: w; 1 calls `velocity` alone, anything else costs two evaluations in one batched call.
        keep_norm: rescale to the norm of the velocity under the positive condition.
    """

    velocity: Velocity
    neg_cond: TextCond | None
    scale: float
    keep_norm: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale must be a finite number, got {self.scale} (1 is off)")

    @property
    def nfe_per_call(self) -> int:
        """Network evaluations per sample and call."""
        return 1 if self.scale == 1 else 2

    def __call__(self, x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        if self.scale == 1:
            return self.velocity(x_t, t, cond)
        v_neg, v_pos = self.branches(x_t, t, cond)
        return (combine_keeping_norm if self.keep_norm else combine)(v_neg, v_pos, self.scale)

    def branches(self, x_t: Tensor, t: Tensor, cond: TextCond) -> tuple[Tensor, Tensor]:
        """v_neg and v_pos, each (B, ...), in one batched call; whatever the scale."""
        neg = cond.null_like() if self.neg_cond is None else self.neg_cond.to(cond.pooled.device).expand(len(cond))
        both = self.velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), TextCond.cat([neg, cond]))
        v_neg, v_pos = both.chunk(2)
        return v_neg, v_pos


def guided(velocity: Velocity, neg_cond: TextCond | None, w: float, keep_norm: bool = False) -> Guided:
    """`velocity` with guidance scale `w` against `neg_cond` (batch of 1, or None for the null condition).

    `keep_norm` gives norm-preserving guidance.

    Raises:
        ValueError: `w` is not finite.
    """
    return Guided(velocity, neg_cond, float(w), keep_norm)
