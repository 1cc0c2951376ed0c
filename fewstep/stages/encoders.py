"""What a student is told: any subset of the three text encoders (SD3.5-Flash, "text-encoder restructuring").

SD3 learns with each encoder's output zeroed now and then, so a model does without T5 by being given zeros. A student loses
less if it meets that while it is distilled (b): teacher and proxy are told everything, the student what is left. One that
never reads T5 need not be given T5's zeros either (e); it then computes a shorter sequence, which is another function, so
that how many tokens it is given stands in its artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import noise
from fewstep.conditioning import ENCODERS, Layout, TextCond, cut, without
from fewstep.flow import Velocity

DROP = 90  # stream of addressed noise

Reads = Callable[[TextCond, Sequence[int]], TextCond]
"""What a student is given of the conditions (B) of samples with these numbers."""


def everything(cond: TextCond, rows: Sequence[int]) -> TextCond:
    """A student that is given all of it."""
    return cond


def whole(cond: TextCond) -> TextCond:
    """The same where no sample goes without."""
    return cond


@dataclass(frozen=True)
class Config:
    """What the student is told while it is distilled.

    Attributes:
        drop_clip_l, drop_clip_g, drop_t5: with which probability a sample is made without this encoder; 1 makes a student
            that never reads it (SD3's own pretraining: .464 each; the paper drops T5 when sampling).
        padded: a student that never reads T5 is given zeros in its place, as stock diffusers gives them; if not, it is given
            a shorter sequence.
    """

    drop_clip_l: float = 0.0
    drop_clip_g: float = 0.0
    drop_t5: float = 0.0
    padded: bool = True

    def __post_init__(self) -> None:
        for name, p in zip(ENCODERS, self.drops, strict=True):
            if not 0 <= p <= 1:
                raise ValueError(f"drop_{name} is a probability, got {p}")
        if not self.encoders:
            raise ValueError("drop_clip_l, drop_clip_g and drop_t5 are all 1: a student that reads nothing draws anything")
        if not self.padded and "t5" in self.encoders:
            raise ValueError("padded=false leaves T5's tokens out for good: set drop_t5=1 with it")

    @property
    def drops(self) -> tuple[float, float, float]:
        """Probabilities in the order of `ENCODERS`."""
        return self.drop_clip_l, self.drop_clip_g, self.drop_t5

    @property
    def encoders(self) -> tuple[str, ...]:
        """Those that the student reads at all."""
        return tuple(name for name, p in zip(ENCODERS, self.drops, strict=True) if p < 1)


def dropout(config: Config, layout: Layout, seed: int) -> Reads:
    """What a student is given in training: which encoders a sample goes without depends on its number alone."""
    if not any(config.drops):
        return everything

    def reads(cond: TextCond, rows: Sequence[int]) -> TextCond:
        keep = noise.uniform((3,), seed=seed, index=rows, step=DROP) >= torch.tensor(config.drops)
        given = without(cond, keep, layout)
        return given if config.padded else cut(given, layout)

    return reads


def given(encoders: Sequence[str], padded: bool, layout: Layout) -> Callable[[TextCond], TextCond]:
    """What a network that reads these encoders is given of whole conditions."""
    keep = torch.tensor([name in encoders for name in ENCODERS])
    if bool(keep.all()):
        return whole

    def reads(cond: TextCond) -> TextCond:
        left = without(cond, keep.expand(len(cond), 3), layout)
        return left if padded else cut(left, layout)

    return reads


def reading(config: Config, layout: Layout, velocity: Velocity) -> Velocity:
    """A student's velocity that is asked with whole conditions and told what it reads."""
    return told(velocity, given(config.encoders, config.padded, layout))


def told(velocity: Velocity, reads: Callable[[TextCond], TextCond]) -> Velocity:
    """A velocity that is asked with whole conditions and told a part of them."""

    def call(x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        return velocity(x_t, t, reads(cond))

    return call
