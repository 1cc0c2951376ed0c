"""What a model may be asked for, and what it says when it is asked for something else (no torch here).

A student draws on the grid that it was trained on, without guidance. Most bad images of distilled models come from other
steps or from guidance: what cannot work is refused with the fix, what can is done and said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_STEPS, MOST_GUIDANCE, MOST_CHARACTERS = 1000, 100.0, 10_000
ADDRESSES = 2**63  # seeds and numbers of images
MOST_SIDE = 2**14  # pixels, where a table of positions does not say


@dataclass(frozen=True)
class Ask:
    """One image that is wanted.

    Attributes:
        prompt: what it shows.
        seed, index: address of its noise (`noise.normal(shape, seed=seed, index=[index], step=0)`), 0 to 2^63 - 1.
        negative_prompt: what guidance leads away from.
        steps: None is the model's own.
        guidance_scale: None is the model's own; 1 is off.
        width, height: in pixels; None is the model's own.
    """

    prompt: str
    seed: int
    index: int = 0
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None


class Made(NamedTuple):
    """An image, and how it was made.

    Attributes:
        image: (H, W, 3).
        ask: what was asked, every field filled with what was used.
        grid: times visited.
        nfe: network evaluations of this image; guidance doubles them.
        warnings: departures from the contract, in words.
        seconds: "text", "denoise", "decode" of the batch, divided by its images.
    """

    image: NDArray[np.uint8]
    ask: Ask
    grid: tuple[float, ...]
    nfe: int
    warnings: tuple[str, ...]
    seconds: dict[str, float]


class Contract(NamedTuple):
    """How a model is to be sampled.

    Attributes:
        name: the folder's.
        kind: see `engine.artifact.Kind`.
        weights: hash of its weights.
        steps: numbers of steps that it draws; empty is any.
        default_steps: of them.
        guidance_scale: its own; 1 is off.
        guided: whether it was made to be guided.
        width, height: its own size in pixels.
        t5_tokens: tokens of T5 that it is given.
        encoders: text encoders that it reads.
        dtype: that it computes in.
        grid: times of its default steps.
        largest: pixels of the longest side that its table of positions reaches; 0 is unknown.
        multiple: of pixels, that sides must be.
    """

    name: str
    kind: str
    weights: str
    steps: tuple[int, ...]
    default_steps: int
    guidance_scale: float
    guided: bool
    width: int
    height: int
    t5_tokens: int
    encoders: tuple[str, ...]
    dtype: str
    grid: tuple[float, ...] = ()
    largest: int = 0
    multiple: int = 16


def resolve(contract: Contract, ask: Ask) -> tuple[Ask, tuple[str, ...]]:
    """What will be drawn, every field filled, and in which way that departs from the contract, in words.

    Raises:
        ValueError: it cannot be drawn; says what can.
    """
    _check(ask)
    steps = contract.default_steps if ask.steps is None else ask.steps
    if contract.steps and steps not in contract.steps:
        there = " or ".join(map(str, contract.steps))
        why = f"{contract.name} was made for {there} steps, others give noise"
        raise ValueError(f"steps = {_shown(steps)}: {why}; give {there}")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps = {_shown(steps)}: give 1 to {MOST_STEPS}")
    asked = contract.guidance_scale if ask.guidance_scale is None else ask.guidance_scale
    if not 0 <= asked <= MOST_GUIDANCE:  # before it becomes a float, which not every whole number can
        raise ValueError(f"guidance_scale = {_shown(asked)}: give 0 to {MOST_GUIDANCE:g} (1 is off)")
    scale = float(asked)
    width = contract.width if ask.width is None else ask.width
    height = contract.height if ask.height is None else ask.height
    for side, pixels in (("width", width), ("height", height)):
        _check_side(contract, side, pixels)
    said = []
    if scale != 1 and not contract.guided:
        said.append(f"guidance {scale:g}: {contract.name} has its guidance built in and is made to be drawn with 1 (off)")
    if scale == 1 and ask.negative_prompt:
        said.append("the negative prompt has no effect without guidance")
    if (width, height) != (contract.width, contract.height):
        said.append(f"{width}x{height}: {contract.name} was made for {contract.width}x{contract.height}")
    return replace(ask, steps=steps, guidance_scale=scale, width=width, height=height), tuple(said)


def _check(ask: Ask) -> None:
    for name in ("prompt", "negative_prompt"):
        text = getattr(ask, name)
        if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
            raise ValueError(f"{name}: give text of at most {MOST_CHARACTERS:,} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} is not text that UTF-8 can hold (half of a character): mend it") from None
    for name in ("seed", "index"):
        number = getattr(ask, name)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < ADDRESSES:
            raise ValueError(f"{name} = {_shown(number)}: give a whole number from 0 to 2^63 - 1")
    for name in ("steps", "width", "height"):
        number = getattr(ask, name)
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise ValueError(f"{name} = {_shown(number)}: give a whole number")
    scale = ask.guidance_scale
    if scale is not None and (not isinstance(scale, int | float) or isinstance(scale, bool)):
        raise ValueError(f"guidance_scale = {_shown(scale)}: give a number")


def _shown(value: object) -> str:
    """Short, also a whole number that is too long to be written."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"{'-' if value < 0 else ''}2^{abs(value).bit_length() - 1} or more"
    return f"{value!r:.40}"


def _check_side(contract: Contract, side: str, pixels: int) -> None:
    step, most = contract.multiple, contract.largest or MOST_SIDE
    nearest = min(max(step, round(max(0, min(pixels, most)) / step) * step), most // step * step)
    if pixels > most:
        why = f"{contract.name} knows positions up to {most} pixels" if contract.largest else f"give at most {most}"
        raise ValueError(f"{side} = {_shown(pixels)}: {why}; the nearest is {nearest}")
    if pixels < step or pixels % step:
        raise ValueError(f"{side} = {_shown(pixels)}: give a multiple of {step}; the nearest is {nearest}")
