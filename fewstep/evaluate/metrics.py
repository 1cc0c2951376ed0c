"""How far one set of images is from another, on features of any network: plain tensors (N, D), double precision inside.

frechet: FID, if the features are Inception's; between DINOv2's or CLIP's it is FD-DINOv2 or CLIP-FD.
kid, mmd_rbf, cmmd: squared maximum mean discrepancy (MMD), unbiased, with an interval.

A distance to data says how good the pictures are, and one to the teacher how much a student lost: report both. Numbers of
different networks, or image sizes, or preprocessings are not comparable. Sets to compare lie on one device. Precision,
recall, density and coverage are in `manifold`. The definitions are those of the papers named below, the code and the
intervals ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.evaluate.statistics import LEVEL, Estimate

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) to (N, M)
Clusters = tuple[Sequence[Hashable], Sequence[Hashable]]

TILE = 2048  # points on a side of what is held at once: 34 MB
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0


class Moments(NamedTuple):
    """Mean and scatter of points, which grow batch by batch, so that images need not be in memory at once.

    Attributes:
        n: number of points.
        mean: (D,) double.
        scatter: (D, D) double, the sum of outer products of what is left when the mean is taken away.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased."""
        return self.scatter / (self.n - 1)


class Frechet(NamedTuple):
    """A Fréchet distance, and what is to be said with it."""

    value: float
    warnings: tuple[str, ...]


def moments(x: Tensor, before: Moments | None = None) -> Moments:
    """Moments of points, or of these and all `before` them.

    Args:
        x: (N, D), N from 1.
        before: of the batches so far.

    Raises:
        ValueError: not a matrix of finite numbers, or as wide as before.
    """
    points(x, "the batch")
    for begin in range(0, len(x), TILE):
        part = double(x[begin : begin + TILE])
        mean = part.mean(dim=0)
        own = Moments(len(part), mean, (part - mean).T @ (part - mean))
        before = own if before is None else _joined(before, own)
    assert before is not None
    return before


def frechet(a: Tensor | Moments, b: Tensor | Moments) -> Frechet:
    """Squared Fréchet distance of normal distributions with the sets' moments (Dowson and Landau 1982; Heusel et al. 2017).

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), with roots of symmetric matrices by their eigenvalues. Of
    fewer points than dimensions that last trace is the sum of the singular values of X Y', X and Y the centred points over
    the root of N - 1: a small matrix.

    It has no interval, on purpose: the estimate is too large by about 1 / N times a number that depends on the model (Chong
    and Forsyth 2020), and resampling adds that bias again instead of showing it. Compare values at equal N only, and give
    `kid` beside it.

    Args:
        a, b: features (N, D), or `moments` of them.

    Returns:
        The distance, from 0, and a warning for each set of no more points than dimensions.

    Raises:
        ValueError: a set of fewer than two points, sets of different widths, or features that are not finite.
    """
    first, second = (m if isinstance(m, Moments) else _moments_of(m, name) for m, name in ((a, "first"), (b, "second")))
    if min(first.n, second.n) < 2:
        raise ValueError(f"a covariance needs at least two points in each set, got {first.n} and {second.n}")
    width = len(first.mean)
    if width != len(second.mean):
        raise ValueError(f"the sets have {width} and {len(second.mean)} features: take them from one network")
    if isinstance(a, Tensor) and isinstance(b, Tensor) and max(len(a), len(b)) < width:
        x, y = ((double(s) - m.mean) / math.sqrt(m.n - 1) for s, m in ((a, first), (b, second)))
        shared = torch.linalg.svdvals(x @ y.T).sum()
    else:
        values, vectors = torch.linalg.eigh(first.covariance)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        inner = root @ second.covariance @ root
        shared = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * shared
    value = float((first.mean - second.mean).square().sum() + spread)
    warnings = tuple(
        f"the {name} set has {m.n} points of {width} dimensions: its covariance is singular and the distance much too large"
        for name, m in (("first", first), ("second", second))
        if m.n <= width
    )
    return Frechet(max(value, 0.0), warnings)


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (x.y / D + 1)^3 (Binkowski et al. 2018) of points (N, D) and (M, D): (N, M)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian(bandwidth: float) -> Kernel:
    """The kernel exp(-|x - y|^2 / (2 bandwidth^2)).

    Raises:
        ValueError: a bandwidth that is not positive.
    """
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"a bandwidth must be positive, not {bandwidth}")
    return lambda x, y: torch.exp(-squared_distances(x, y) / (2 * bandwidth**2))


def kid(a: Tensor, b: Tensor, clusters: Clusters | None = None, level: float = LEVEL) -> Estimate:
    """Kernel Inception distance, if the features are Inception's: `mmd` with the polynomial kernel.

    All pairs count. Other tools average over random subsets, often of 1,000 points, which has the same mean and more noise;
    what they print as its deviation is that between subsets, not the uncertainty of the distance.
    """
    return mmd(a, b, polynomial, clusters, level)


def mmd_rbf(a: Tensor, b: Tensor, bandwidth: float, clusters: Clusters | None = None, level: float = LEVEL) -> Estimate:
    """`mmd` with a Gaussian kernel of this bandwidth, in units of the features."""
    return mmd(a, b, gaussian(bandwidth), clusters, level)


def cmmd(a: Tensor, b: Tensor, clusters: Clusters | None = None, level: float = LEVEL) -> Estimate:
    """CMMD (Jayasumana et al. 2024), if the features are CLIP's: directions only, bandwidth 10, times 1,000.

    Theirs counts each point's pair with itself, which makes it larger (by less than 20 / N); ours is unbiased.

    Raises:
        ValueError: a vector of length 0, and as `mmd`.
    """
    found = mmd_rbf(directions(a, "the first set"), directions(b, "the second set"), CMMD_BANDWIDTH, clusters, level)
    return Estimate(*(CMMD_SCALE * x for x in found))


def mmd(
    a: Tensor, b: Tensor, kernel: Kernel, clusters: Clusters | None = None, level: float = LEVEL, tile: int = TILE
) -> Estimate:
    """Squared maximum mean discrepancy (Gretton et al. 2012): 0 on average for equal distributions, so it may be negative.

    Interval: the jackknife's standard error, leaving out one cluster at a time, times Student's t. The estimate is without
    bias, so its interval is symmetric. A bootstrap is not used: where two distributions are nearly equal, which is where one
    looks, copies of one cluster in a draw would shift or shrink it. There the jackknife errs on the wide side.

    Args:
        a, b: features (N, D) and (M, D).
        kernel: symmetric and positive definite.
        clusters: the prompt of each image, in both sets. Images of one prompt are not independent, so their pairs do not
            count, and a prompt is left out with all its images; if both sets answer a prompt, then in both. Default:
            every image stands alone.
        level: coverage of the interval.
        tile: points compared at once; changes memory and the last digits alone.

    Raises:
        ValueError: features not finite or of different widths, clusters that do not fit, or fewer than three in a set.
    """
    if points(a, "the first set").shape[1] != points(b, "the second set").shape[1]:
        raise ValueError(f"the sets have {a.shape[1]} and {b.shape[1]} features: take them from one network")
    groups = _numbered(clusters or (range(len(a)), range(-len(b), 0)), len(a), len(b))
    count = int(torch.cat(groups).max()) + 1
    sizes = [torch.bincount(g, minlength=count).double() for g in groups]
    if min(int((s > 0).sum()) for s in sizes) < 3:
        raise ValueError(f"a discrepancy needs three {'images' if clusters is None else 'prompts'} or more in each set")
    total, left_out = torch.zeros(()).double(), torch.zeros(count).double()
    for i, j, sign in ((0, 0, 1.0), (1, 1, 1.0), (0, 1, -2.0)):
        sums = _sums_by_cluster((a, b)[i], (a, b)[j], kernel, groups[i], groups[j], count, tile)
        whole = sums[0].sum(), sizes[i].sum() * sizes[j].sum() - (sizes[i] * sizes[j]).sum()
        pairs = sizes[i] * (sizes[j].sum() - sizes[j]), sizes[j] * (sizes[i].sum() - sizes[i])
        total += sign * whole[0] / whole[1]
        left_out += sign * (whole[0] - sums[0] - sums[1]) / (whole[1] - pairs[0] - pairs[1])
    return _jackknifed(float(total), left_out, [s > 0 for s in sizes], level)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 of points (N, D) and (M, D): (N, M), exactly 0 for equal points, which rounding would tell apart."""
    lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None]
    found = lengths - 2 * x @ y.T
    return torch.where(found < 1e-13 * lengths, 0.0, found)


def points(x: Tensor, name: str) -> Tensor:
    """The features themselves, once they are known to be a matrix (N, D) of finite numbers."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be features (images, features), not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be features in floating point, not {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        row = int((~torch.isfinite(x)).any(dim=1).nonzero()[0])
        raise ValueError(f"{name} is not finite: look at image {row}")
    return x


def directions(x: Tensor, name: str) -> Tensor:
    """Points (N, D) scaled to length 1, in double precision.

    Raises:
        ValueError: a point of length 0.
    """
    wide = double(points(x, name))
    lengths = wide.norm(dim=-1, keepdim=True)
    if bool((lengths == 0).any()):
        raise ValueError(f"{name} has a vector of length 0 (image {int((lengths == 0).nonzero()[0, 0])}): it has no direction")
    return wide / lengths


def double(x: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return (x.detach().cpu() if x.device.type == "mps" else x.detach()).double()


def tiles(rows: int, columns: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a matrix, row by row."""
    for i in range(0, rows, tile):
        for j in range(0, columns, tile):
            yield slice(i, min(i + tile, rows)), slice(j, min(j + tile, columns))


def _moments_of(x: Tensor, name: str) -> Moments:
    return moments(points(x, f"the {name} set"))


def _joined(a: Moments, b: Moments) -> Moments:
    """Chan, Golub and LeVeque 1983: without the cancellation that sums of squares suffer."""
    if len(a.mean) != len(b.mean):
        raise ValueError(f"the batch has {len(b.mean)} features, those before it {len(a.mean)}")
    n, shift = a.n + b.n, b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(shift, shift) * (a.n * b.n / n)
    return Moments(n, a.mean + shift * (b.n / n), scatter)


def _numbered(clusters: Clusters, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Clusters as numbers from 0, the same number in both sets for the same cluster."""
    if (len(clusters[0]), len(clusters[1])) != (first, second):
        told = len(clusters[0]), len(clusters[1])
        raise ValueError(f"clusters must name each image's prompt: {told[0]} and {told[1]} for {first} and {second} images")
    known = {c: i for i, c in enumerate(dict.fromkeys((*clusters[0], *clusters[1])))}
    one, two = (torch.tensor([known[c] for c in side]) for side in clusters)
    return one, two


def _sums_by_cluster(
    x: Tensor, y: Tensor, kernel: Kernel, gx: Tensor, gy: Tensor, count: int, tile: int
) -> tuple[Tensor, Tensor]:
    """Kernel sums over pairs of different clusters, by the cluster of x and by that of y: two of (count,)."""
    same, rows, columns = gx is gy, torch.zeros(len(x)).double(), torch.zeros(len(y)).double()
    for i, j in tiles(len(x), len(y), tile):
        if same and j.start < i.start:
            continue  # the kernel is symmetric
        found = kernel(double(x[i]), double(y[j])).cpu() * (gx[i, None] != gy[None, j])
        rows[i] += found.sum(dim=1)
        columns[j] += found.sum(dim=0)
        if same and j.start > i.start:
            rows[j] += found.sum(dim=0)
            columns[i] += found.sum(dim=1)
    zeros = torch.zeros(count).double()
    return zeros.index_add(0, gx, rows), zeros.index_add(0, gy, columns)


def _jackknifed(value: float, left_out: Tensor, within: list[Tensor], level: float) -> Estimate:
    """Interval from the values without one cluster each; clusters of one set, of the other and of both vary apart."""
    from scipy.special import stdtrit

    squared, fewest = 0.0, math.inf
    for mask in (within[0] & ~within[1], within[1] & ~within[0], within[0] & within[1]):
        own, n = left_out[mask], int(mask.sum())
        if n == 1:
            raise ValueError("one prompt is alone in being in one set, or in both: sets must share their prompts, or none")
        if n:
            squared += float((own - own.mean()).square().sum()) * (n - 1) / n
            fewest = min(fewest, n)
    half = float(stdtrit(fewest - 1, (1 + level) / 2)) * math.sqrt(squared)
    return Estimate(value, value - half, value + half)
