"""How far one set of images is from another, read by the detector: histograms of what is shown, and MMD.

Strict scores ask whether an image is right; these ask whether the images as a whole are distributed as they should
be. Both compare an arm with another one, or with the true scenes of the same prompts, which the ceiling holds.

histogram: total variation between the shares of each attribute over all objects, 0 (equal) to 1 (nothing in common).
    Two samples of one distribution are a little apart, too: `floor` says how far, by permutation.
energy_distance: between two clouds of points, such as latents; needs no detector.
counts_of: images as vectors of counts, which `metrics.kid` compares: squared MMD with the kernel (x.y / d + 1)^3, unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.evaluate import statistics
from fewstep.evaluate.outcomes import Outcome
from fewstep.worlds.shapes.scene import COLORS, SHAPES, SIZES

Float = NDArray[np.float64]
Facts = Sequence[Sequence[object]]

MOST = 5  # images with this many objects or more share a bin
VALUES: dict[str, tuple[object, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "size": SIZES,
    "cell": tuple(range(9)),
    "shape_color": tuple((s, c) for s in SHAPES for c in COLORS),
    "objects": tuple(range(MOST + 1)),
}
DRAWS = 1_000


class Distance(NamedTuple):
    """Total variation of one attribute, its interval over prompts, and the mean between samples of one distribution."""

    attribute: str
    mean: float
    lo: float
    hi: float
    floor: float


def counts(facts: Facts) -> dict[str, Float]:
    """What one image shows, as counts of each value of each attribute; "objects" is one-hot."""
    shown: dict[str, list[object]] = {
        "shape": [f[0] for f in facts],
        "color": [f[1] for f in facts],
        "size": [f[2] for f in facts],
        "cell": [f[3] for f in facts],
        "shape_color": [(f[0], f[1]) for f in facts],
        "objects": [min(len(facts), MOST)],
    }
    return {name: np.array([shown[name].count(v) for v in values], dtype=np.float64) for name, values in VALUES.items()}


def counts_of(images: Sequence[Facts]) -> Tensor:
    """What images show, as vectors of all counts together: (N, D) double."""
    return torch.from_numpy(np.stack([np.concatenate([*counts(facts).values()]) for facts in images]))


def of_arm(outcome: Outcome, truth: bool = False) -> list[Facts]:
    """What each image of an arm shows; `truth` takes the true scenes that the ceiling holds.

    Raises:
        ValueError: the arm holds no true scenes.
    """
    if not truth:
        return [r["facts"] for r in outcome["results"]]
    if any("truth" not in r for r in outcome["results"]):
        raise ValueError(f"{outcome['name']} holds no true scenes: it must be the autoencoder's arm")
    return [r["truth"] for r in outcome["results"]]


def total_variation(a: Float, b: Float) -> Float:
    """Half the summed absolute difference of the shares of two histograms (..., K); 1 where one is empty alone."""
    shares = [h / np.maximum(h.sum(axis=-1, keepdims=True), 1e-12) for h in (a, b)]
    empty = [h.sum(axis=-1) == 0 for h in (a, b)]
    out: Float = np.where(empty[0] != empty[1], 1.0, np.abs(shares[0] - shares[1]).sum(axis=-1) / 2)
    return out


def histograms(
    first: Sequence[Facts], second: Sequence[Facts], prompts: Sequence[int], draws: int = DRAWS, seed: int = 0
) -> list[Distance]:
    """Total variation of every attribute between two sets of images of the same prompts, image by image aligned.

    Args:
        first, second: what each image shows.
        prompts: the prompt number of each image; prompts are resampled together with all their images.
        draws: of the bootstrap, and of the permutations that swap the two sets prompt by prompt.
        seed: of both.

    Raises:
        ValueError: sets of different sizes, or none.
    """
    if not prompts or not len(first) == len(second) == len(prompts):
        raise ValueError(f"histograms need two aligned sets of images, got {len(first)}, {len(second)}, {len(prompts)}")
    groups = [np.flatnonzero(np.asarray(prompts) == p) for p in dict.fromkeys(prompts)]
    times = statistics.resampling(len(groups), draws, seed, 0)
    swaps = np.random.default_rng([seed, 1]).random((draws, len(groups))) < 0.5
    read = [[counts(f) for f in side] for side in (first, second)]
    out: list[Distance] = []
    for name in VALUES:
        a, b = (np.stack([np.sum([side[i][name] for i in rows], axis=0) for rows in groups]) for side in read)
        drawn = total_variation(times @ a, times @ b)
        swapped = total_variation(*(np.where(s[..., None], x, y).sum(axis=1) for s, x, y in ((swaps, a, b), (swaps, b, a))))
        value = float(total_variation(a.sum(axis=0), b.sum(axis=0)))
        out.append(Distance(name, value, *statistics.percentiles(drawn), float(swapped.mean())))
    return out


def energy_distance(a: Tensor, b: Tensor, paired: bool = False) -> tuple[float, float]:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two samples (N, d), unbiased, and E|a - b|, which bounds it by half.

    Args:
        a, b: points. The distance is 0 on average for equal distributions, so it may be slightly negative.
        paired: a[i] and b[i] are not independent (they have one origin), so that pair does not count.

    Raises:
        ValueError: fewer than two points in a sample, or paired samples of different sizes.
    """
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        raise ValueError(f"energy_distance needs at least two points each, as many if paired, got {len(a)} and {len(b)}")

    def apart(x: Tensor, y: Tensor, diagonal: bool) -> Tensor:
        distances = torch.cdist(x.double(), y.double())
        if diagonal:
            return distances.mean()
        return (distances.sum() - distances.diagonal().sum()) / (len(x) * (len(x) - 1))

    cross = apart(a, b, diagonal=not paired)
    return float(2 * cross - apart(a, a, False) - apart(b, b, False)), float(cross)
