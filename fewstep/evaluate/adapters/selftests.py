"""Self-tests of adapters: a metric that does not pass them prints no score.

1. Preprocessing and a tiny network of the same classes give the numbers that were recorded (`tiny`): offline, for everybody.
2. With the real weights: rendered pictures whose order is known are put in that order.

A network with wrong weights, a swapped channel, another filter or a renamed tokenizer fails one of them. They cannot tell a
good checkpoint from a slightly worse one: the hash of the weights stands in the protocol for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fewstep.engine.doctor import Finding
from fewstep.evaluate import metrics
from fewstep.evaluate.adapters import inception, tiny
from fewstep.evaluate.adapters.parts import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Adapter,
    Measure,
    Pixels,
    barred,
    cropped,
    squared,
)
from fewstep.worlds.shapes.scene import Color, Shape

TOLERANCE = 2e-3  # of the spread of golden numbers: float32 in other orders gives about 1e-5, another filter 1e-2 and more
PIXEL_TOLERANCE = 2e-3  # normalised pixels: half a grey level is 7e-3
PLAUSIBLE = (1.0, 9.0)  # aesthetic scores of simple pictures
PLACES = ((30, 32), (34, 33))  # centres of one thing in its two pictures, of 64
SIDE = 512  # pixels of a picture


class Pair(NamedTuple):
    """Two scenes that differ in everything that a caption says."""

    first: tuple[Shape, Color]
    second: tuple[Shape, Color]


PAIRS = (
    Pair(("circle", "red"), ("square", "blue")),
    Pair(("square", "yellow"), ("circle", "purple")),
    Pair(("triangle", "green"), ("circle", "pink")),
    Pair(("cross", "red"), ("square", "green")),
    Pair(("circle", "blue"), ("triangle", "orange")),
    Pair(("square", "red"), ("triangle", "blue")),
    Pair(("cross", "blue"), ("circle", "yellow")),
    Pair(("triangle", "purple"), ("square", "orange")),
)


def caption(thing: tuple[Shape, Color]) -> str:
    """What a picture of one thing shows."""
    return f"a {thing[1]} {thing[0]} on a light grey background"


def picture(thing: tuple[Shape, Color], place: tuple[int, int] = (32, 32)) -> Pixels:
    """One large thing, enlarged until it looks like a poster: (512, 512, 3)."""
    return np.asarray(Image.fromarray(tiny.scene((*thing, *place))).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def prepared() -> NDArray[np.float64]:
    """Some pixels of each preprocessing of the wide probe, 3 a kind."""
    wide = tiny.probes()[1]
    kinds: list[Tensor] = [
        cropped(wide, 224, 224, CLIP_MEAN, CLIP_STD),
        cropped(wide, 256, 224, IMAGENET_MEAN, IMAGENET_STD),
        squared(wide, 224, IMAGENET_MEAN, IMAGENET_STD),
        barred(wide, 224, CLIP_MEAN, CLIP_STD),
        torch.from_numpy(inception.clean(wide)).permute(2, 0, 1).double() / 255,
    ]
    return np.array([[float(k[0, 100, 3]), float(k[1, 60, 120]), float(k[2, 150, 200])] for k in kinds])


# Recorded with Pillow 13.0 and torch 2.13; the tests compare the first three kinds with transformers' own processors.
PREPARED: tuple[tuple[float, float, float], ...] = (
    (-1.03314, 1.62465, -1.01096),
    (-1.62129, 1.86835, -1.07242),
    (0.51931, 1.92087, 0.53107),
    (0.45397, -1.13860, -0.70643),
    (0.57255, 0.29020, 0.10980),
)
GOLDEN: dict[str, tuple[float, ...]] = {
    "clip_score": (31.6332, 32.784, 45.1704),
    "pick_score": (0.85988, 0.891162, 1.22786),
    "hps_v2.1": (0.316332, 0.298808, 0.684407),
    "aesthetic": (0.0383353, 0.0702173, -0.012418),
    "clip": (
        -0.164231, 0.186446, -0.35313, -0.180374, -0.206337, 0.297132,
        -0.364489, 0.0167367, -0.109847, 0.321541, -0.324559, -0.140505,
    ),
    "dinov2": (
        -0.440029, -0.0533296, -1.98633, 1.26959, -0.0751025, -0.124058,
        -2.37224, 1.16381, -0.079584, -0.120345, -2.35972, 1.17462,
    ),
    "dinov2_crop": (
        -0.469945, -0.0465103, -1.99839, 1.27437, -0.0898956, -0.128903,
        -2.37998, 1.12813, -0.0772218, -0.105844, -2.35514, 1.13397,
    ),
}


def numbers(measure: Measure) -> NDArray[np.float64]:
    """What a measure says of the probes, as at most twelve numbers: all scores, or the first features of each."""
    found = measure(tiny.probes(), tiny.PROMPTS).double()
    return (found if found.ndim == 1 else found[:, :4].flatten()).numpy()


def offline(adapter: Adapter) -> Iterator[Finding]:
    """Whether preprocessing and tiny network give what was recorded."""
    found, expected = prepared(), np.array(PREPARED)
    good = bool(np.allclose(found, expected, atol=PIXEL_TOLERANCE))
    off = np.abs(found - expected).max()
    fix = "" if good else "another version of Pillow or torch resizes otherwise: pip install -c constraints.txt pillow torch"
    said = f"preprocessing, off by {off:.0e} of {PIXEL_TOLERANCE:.0e}"
    yield Finding("ok" if good else "FAIL", adapter.name, said, fix)
    if adapter.tiny is None:
        return
    golden = np.array(GOLDEN[adapter.name])
    off = float(np.abs(numbers(adapter.tiny()) - golden).max() / np.abs(golden).max())
    good = off <= TOLERANCE
    fix = "" if good else "another version of transformers computes otherwise: pip install -c constraints.txt transformers"
    said = f"network of known weights, off by {off:.0e} of {TOLERANCE:.0e}"
    yield Finding("ok" if good else "FAIL", adapter.name, said, fix)


def with_weights(adapter: Adapter, measure: Measure) -> Iterator[Finding]:
    """Whether real weights put pictures in the order that is known."""
    checks: dict[str, Callable[[Measure], tuple[bool, str]]] = {"pair": ranks, "image": plausible, "features": nearer}
    check = far_from_noise if adapter.name.startswith("inception") else checks[adapter.kind]
    good, said = check(measure)
    fix = "" if good else f"these are not the weights that {adapter.name} needs, or they are damaged: get them again"
    yield Finding("ok" if good else "FAIL", adapter.name, said, fix)


def ranks(measure: Measure) -> tuple[bool, str]:
    """Right captions above wrong ones in all pairs, each pair's four scores taken together.

    s(A, a) - s(A, b) + s(B, b) - s(B, a) > 0: what a caption or a picture gets anyway falls out.
    """
    right = 0
    for first, second in PAIRS:
        images = [picture(first), picture(first), picture(second), picture(second)]
        own, other, others, owns = measure(images, [caption(t) for t in (first, second, second, first)]).tolist()
        right += own - other + others - owns > 0
    return right == len(PAIRS), f"right captions above wrong ones in {right} of {len(PAIRS)} pairs"


def plausible(measure: Measure) -> tuple[bool, str]:
    """Scores of simple pictures in the range of the scale."""
    scores = measure([picture(pair.first) for pair in PAIRS], [])
    low, high = float(scores.min()), float(scores.max())
    good = PLAUSIBLE[0] <= low and high <= PLAUSIBLE[1] and high > low
    return good, f"simple pictures score {low:.2f} to {high:.2f}, {PLAUSIBLE[0]:.0f} to {PLAUSIBLE[1]:.0f} is plausible"


def nearer(measure: Measure) -> tuple[bool, str]:
    """Two pictures of one thing, at two places, nearer to each other than to the pictures of the other thing."""
    right = 0
    for first, second in PAIRS:
        seen = measure([picture(thing, place) for thing in (first, second) for place in PLACES], [])
        apart = torch.cdist(seen.double(), seen.double())
        right += bool(max(apart[0, 1], apart[2, 3]) < apart[:2, 2:].mean())
    return right == len(PAIRS), f"pictures of one thing nearer to each other in {right} of {len(PAIRS)} pairs"


def far_from_noise(measure: Measure) -> tuple[bool, str]:
    """Fréchet distance 0 of a set to itself, and to noise many times that between two sets of pictures."""
    sets = [[picture(thing, place) for pair in PAIRS for thing in pair] for place in PLACES]
    noise = [((tiny.hashed(128 * 128 * 3, n) + 1) * 127.5).astype(np.uint8).reshape(128, 128, 3) for n in range(len(sets[0]))]
    one, two, other = (measure(images, []).double() for images in (*sets, noise))
    itself, near, far = (metrics.frechet(one, seen).value for seen in (one, two, other))
    good = one.shape[1] == 2048 and abs(itself) < 1e-3 * far and far > near
    return good, f"Fréchet distance to itself {itself:.3f}, to other pictures {near:.1f}, to noise {far:.1f}"
