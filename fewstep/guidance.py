"""Classifier-free guidance: v = v_neg + w (v_pos - v_neg); w = 1 is off.

Some code bases write cond + w (cond - uncond); their w = 3 is our w = 4.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity


def combine(v_neg: Tensor, v_pos: Tensor, w: float) -> Tensor:
    """v_neg + w (v_pos - v_neg), same shape. At w = 1 this is `v_pos` exactly, not up to rounding."""
    return v_pos if w == 1 else v_neg + w * (v_pos - v_neg)


@dataclass(frozen=True)
class Guided:
    """A velocity with guidance built in; itself a velocity.

    Attributes:
        velocity: the plain velocity.
        neg_cond: the negative condition, batch of 1; None is the null condition (zeros).
        scale: w; 1 calls `velocity` alone, anything else costs two evaluations in one batched call.
    """

    velocity: Velocity
    neg_cond: TextCond | None
    scale: float

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
        neg = cond.null_like() if self.neg_cond is None else self.neg_cond.expand(len(cond))
        both = self.velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), TextCond.cat([neg, cond]))
        v_neg, v_pos = both.chunk(2)
        return combine(v_neg, v_pos, self.scale)


def guided(velocity: Velocity, neg_cond: TextCond | None, w: float) -> Guided:
    """`velocity` with guidance scale `w` against `neg_cond` (batch of 1, or None for the null condition).

    Raises:
        ValueError: `w` is not finite.
    """
    return Guided(velocity, neg_cond, float(w))
