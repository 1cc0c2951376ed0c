"""Are the pictures good, and are they all there: two sets of features compared by balls around points.

A ball reaches to a point's k-th neighbour. Precision and recall: Kynkäänniemi et al. 2019. Density and coverage, less moved by
a few outliers: Naeem et al. 2020. All four depend on the number of images and on k: compare arms of equal size with one
reference. They count over balls that overlap, so images are not independent in them, and no interval is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.evaluate.metrics import TILE, double, points, squared_distances, tiles

NEIGHBOURS = 5
EDGE = 1 + 1e-9  # of a squared radius: equal distances, as counts have them, differ in the last digits


class PrecisionRecall(NamedTuple):
    """Share of fakes inside some ball around a real image, and of real images inside some ball around a fake; 0 to 1."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Real balls that hold a fake, counted over k, 1 on average for equal distributions; share of real balls that hold one."""

    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS, tile: int = TILE) -> PrecisionRecall:
    """Improved precision (are fakes like something real) and recall (is everything real like some fake).

    Args:
        real, fake: features (N, D) and (M, D).
        k: a ball reaches to the k-th nearest other point of its own set, its edge included.
        tile: points compared at once; changes memory and the last digits alone.

    Raises:
        ValueError: features not finite or of different widths, or a set with no more than k points.
    """
    _checked(real, fake, k, both=True)
    around_real, around_fake = EDGE * radii(real, k, tile), EDGE * radii(fake, k, tile)
    precise, recalled = torch.zeros(len(fake), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for i, j, found in _compared(real, fake, tile):
        precise[j] |= (found <= around_real[i, None]).any(dim=0)
        recalled[i] |= (found <= around_fake[None, j]).any(dim=1)
    return PrecisionRecall(float(precise.double().mean()), float(recalled.double().mean()))


def density_coverage(real: Tensor, fake: Tensor, k: int = NEIGHBOURS, tile: int = TILE) -> DensityCoverage:
    """Density (how deep fakes lie among real images; may exceed 1) and coverage (how many real images have a fake near).

    For N real and as many fake images of one distribution density is 1 on average, and coverage is
    1 - (N - 1) ... (N - k) / ((2 N - 1) ... (2 N - k)), about 1 - 2^-k.

    Args and errors: as `precision_recall`, but any number of fakes will do.
    """
    _checked(real, fake, k, both=False)
    around = EDGE * radii(real, k, tile)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for i, _, found in _compared(real, fake, tile):
        held = found <= around[i, None]
        inside += int(held.sum())
        covered[i] |= held.any(dim=1)
    return DensityCoverage(inside / (k * len(fake)), float(covered.double().mean()))


def radii(x: Tensor, k: int, tile: int = TILE) -> Tensor:
    """Squared distance of every point (N, D) to its k-th nearest other point: (N,) double."""
    nearest = torch.full((len(x), k), float("inf"), dtype=torch.float64)
    for i, j, found in _compared(x, x, tile):
        if i == j:
            found.fill_diagonal_(float("inf"))
        both = torch.cat([nearest[i], found], dim=1)
        nearest[i] = both.topk(k, dim=1, largest=False).values
    return nearest.max(dim=1).values


def _compared(x: Tensor, y: Tensor, tile: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances piece by piece; features are taken relative to a common point, or their mean would drown them."""
    origin = double(x[:tile]).mean(dim=0)
    for i, j in tiles(len(x), len(y), tile):
        yield i, j, squared_distances(double(x[i]) - origin, double(y[j]) - origin).cpu()


def _checked(real: Tensor, fake: Tensor, k: int, both: bool) -> None:
    if points(real, "the real set").shape[1] != points(fake, "the fake set").shape[1]:
        raise ValueError(f"the sets have {real.shape[1]} and {fake.shape[1]} features: take them from one network")
    fewest = min(len(real), len(fake)) if both else len(real)
    if not 1 <= k < fewest:
        raise ValueError(f"k must be 1 or more, and below the {fewest} images of a set, not {k}: every ball needs k others")
