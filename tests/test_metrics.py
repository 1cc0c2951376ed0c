"""Metrics on features: closed forms, independent implementations, no bias where nothing differs, hostile input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from fewstep.evaluate import manifold, metrics


def normal(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given_moments(n: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """Points whose mean and covariance are exactly `mean` and root root^T."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return x @ root.T + mean


def test_frechet_of_known_gaussians() -> None:
    """Covariances that commute: |difference of means|^2 + sum of (sqrt a - sqrt b)^2 of their eigenvalues."""
    basis = torch.linalg.qr(normal(5, 5, 0)).Q
    a, b = torch.tensor([1.0, 4, 9, 0.25, 2]).double(), torch.tensor([4.0, 1, 9, 1, 0]).double()
    mean = torch.arange(5).double()
    x = given_moments(200, mean, basis * a.sqrt(), 1)
    y = given_moments(300, 2 * mean, basis * b.sqrt(), 2)
    expected = float((mean**2).sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = metrics.frechet(x, y)
    assert found.value == pytest.approx(expected, rel=1e-6) and found.warnings == ()
    assert metrics.frechet(y, x).value == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet(3 * x, 3 * y).value == pytest.approx(9 * expected, rel=1e-6)
    assert metrics.frechet(x, x).value == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x, x + 2).value == pytest.approx(4 * 5, rel=1e-9)  # a shift of 2 in each of five dimensions


def test_frechet_is_that_of_a_matrix_square_root() -> None:
    x, y = normal(90, 12, 3) @ normal(12, 12, 4), normal(70, 12, 5) @ normal(12, 12, 6) + 1
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    apart = (x.mean(0) - y.mean(0)).square().sum().item()
    expected = apart + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert metrics.frechet(x, y).value == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet(x.float(), y.float()).value == pytest.approx(expected, rel=1e-4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_moments_do_not_depend_on_batches(sizes: list[int], offset: float) -> None:
    x = normal(sum(sizes), 3, 7) + offset
    found = None
    for batch in x.split(sizes):
        found = metrics.moments(batch, found)
    assert found is not None and found.n == len(x)
    assert torch.allclose(found.mean, x.mean(dim=0), rtol=1e-12, atol=1e-12)
    if len(x) > 1:
        assert torch.allclose(found.covariance, torch.from_numpy(np.cov(x.numpy(), rowvar=False)), atol=1e-8)


def test_frechet_of_moments_is_that_of_points_and_small_sets_are_told() -> None:
    x, y = normal(40, 6, 8), normal(6, 6, 9)
    streamed = metrics.moments(x[25:], metrics.moments(x[:25]))
    assert metrics.frechet(streamed, y).value == pytest.approx(metrics.frechet(x, y).value, rel=1e-10)
    assert [w.split(" set")[0] for w in metrics.frechet(y, x).warnings] == ["the first"]
    assert len(metrics.frechet(y, y).warnings) == 2 and not metrics.frechet(x, x).warnings


def test_the_bias_of_frechet_is_why_it_has_no_interval() -> None:
    """Two samples of one distribution are apart, four times as far with a fourth of the points."""
    small = np.mean([metrics.frechet(normal(100, 8, i), normal(100, 8, 500 + i)).value for i in range(40)])
    large = np.mean([metrics.frechet(normal(400, 8, i), normal(400, 8, 500 + i)).value for i in range(40)])
    assert small > 0.3 and 3 < small / large < 5


def loops(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], float], cx: list[int], cy: list[int]) -> float:
    """The unbiased estimate, pair by pair; only pairs of different clusters count."""

    def mean(u: Tensor, v: Tensor, cu: list[int], cv: list[int]) -> float:
        found = [kernel(p, q) for p, i in zip(u, cu, strict=True) for q, j in zip(v, cv, strict=True) if i != j]
        return sum(found) / len(found)

    return mean(x, x, cx, cx) + mean(y, y, cy, cy) - 2 * mean(x, y, cx, cy)


def test_kid_and_its_interval_are_those_of_plain_loops() -> None:
    x, y = normal(8, 3, 10), normal(6, 3, 11) + 0.5

    def cubic(p: Tensor, q: Tensor) -> float:
        return (float(p @ q) / 3 + 1) ** 3

    cx, cy = list(range(8)), list(range(8, 14))
    found = metrics.kid(x, y)
    assert found.mean == pytest.approx(loops(x, y, cubic, cx, cy), rel=1e-10)
    without_x = [loops(x[[j for j in cx if j != i]], y, cubic, cx[:7], cy) for i in range(8)]
    without_y = [loops(x, y[[j for j in range(6) if j != i]], cubic, cx, cy[:5]) for i in range(6)]
    error = math.sqrt(7 * np.var(without_x) + 5 * np.var(without_y))
    assert found.hi - found.mean == pytest.approx(2.5706 * error, rel=1e-4)  # Student's t with 6 - 1 degrees of freedom
    assert found.mean - found.lo == pytest.approx(found.hi - found.mean)


def test_pairs_of_one_prompt_do_not_count_and_prompts_are_left_out_whole() -> None:
    x, y = normal(9, 2, 12), normal(8, 2, 13)
    cx, cy = [0, 0, 0, 1, 1, 2, 2, 3, 3], [3, 0, 0, 1, 1, 2, 3, 3]

    def cubic(p: Tensor, q: Tensor) -> float:
        return (float(p @ q) / 2 + 1) ** 3

    found = metrics.kid(x, y, (cx, cy))
    assert found.mean == pytest.approx(loops(x, y, cubic, cx, cy), rel=1e-10)
    values = []
    for p in range(4):
        kx, ky = [i for i, c in enumerate(cx) if c != p], [i for i, c in enumerate(cy) if c != p]
        values.append(loops(x[kx], y[ky], cubic, [cx[i] for i in kx], [cy[i] for i in ky]))
    assert found.hi - found.mean == pytest.approx(3.1824 * math.sqrt(3 * np.var(values)), rel=1e-4)


def test_rbf_and_cmmd_are_those_of_sklearn() -> None:
    x, y = normal(30, 5, 14), normal(25, 5, 15) + 1

    def unbiased(u: np.ndarray, v: np.ndarray, bandwidth: float) -> float:
        def own(w: np.ndarray) -> float:
            k = rbf_kernel(w, gamma=0.5 / bandwidth**2)
            return float((k.sum() - np.trace(k)) / (len(w) * (len(w) - 1)))

        return own(u) + own(v) - 2 * float(rbf_kernel(u, v, gamma=0.5 / bandwidth**2).mean())

    assert metrics.mmd_rbf(x, y, 1.7).mean == pytest.approx(unbiased(x.numpy(), y.numpy(), 1.7), rel=1e-9)
    u, v = (z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True) for z in (x, y))
    assert metrics.cmmd(x, y).mean == pytest.approx(1000 * unbiased(u, v, 10.0), rel=1e-6)
    assert metrics.cmmd(7 * x, y / 3).mean == pytest.approx(metrics.cmmd(x, y).mean, rel=1e-9)  # directions alone


@pytest.mark.parametrize("measure", [metrics.kid, lambda a, b, c: metrics.mmd_rbf(a, b, 2.0, c)])
def test_equal_distributions_are_at_no_distance_on_average(measure: Callable[..., metrics.Estimate]) -> None:
    """Four images of each prompt, which have much in common; the prompts are other ones, or the same in both sets."""
    for shared in (False, True):
        found = []
        for i in range(200):
            own = normal(2, 20 * 6, 1000 + i).reshape(2, 20, 1, 6)
            x, y = (own[0 if shared else s] + normal(80, 6, 5000 + 2 * i + s).reshape(20, 4, 6) for s in (0, 1))
            prompts = [p for p in range(20) for _ in range(4)]
            there = prompts if shared else [p + 20 for p in prompts]
            found.append(measure(x.reshape(80, 6), y.reshape(80, 6), (prompts, there)).mean)
        error = np.std(found) / math.sqrt(200)
        assert abs(np.mean(found)) < 4 * error and min(found) < 0 < max(found)


@pytest.mark.parametrize(("shift", "least"), [(0.0, 0.95), (1.0, 0.90)])
def test_intervals_hold_the_true_distance(shift: float, least: float) -> None:
    """Cautious where the sets are equal (theory: 1.4 times too wide); near 95 % where they are not, with 40 prompts."""
    width, repeats = 4, 300
    powers = {(s, t): cubic_of_normals(s, t, width) for s, t in ((0, 0), (0, shift), (shift, shift))}
    truth = powers[0, 0] + powers[shift, shift] - 2 * powers[0, shift]
    held = 0
    for i in range(repeats):
        own = normal(40, 2 * width, 20_000 + i).reshape(40, 1, 2, width) * math.sqrt(0.5)
        each = normal(160, 2 * width, 30_000 + i).reshape(40, 4, 2, width) * math.sqrt(0.5)
        x, y = (own + each).reshape(160, 2, width).unbind(dim=1)
        y = y + torch.tensor([shift] + [0.0] * (width - 1)).double()
        prompts = [p for p in range(40) for _ in range(4)]
        found = metrics.kid(x, y, (prompts, [p + 40 for p in prompts]))
        held += found.lo <= truth <= found.hi
    assert least <= held / repeats


def cubic_of_normals(s: float, t: float, width: int) -> float:
    """E (x.y / D + 1)^3 for independent standard normal x, y whose first coordinates have means s and t."""
    first, second = s * t, (1 + s**2) * (1 + t**2)
    third = (s**3 + 3 * s) * (t**3 + 3 * t)
    rest = width - 1  # the other coordinates add 0, rest and 0 to the first three moments
    moments = first, second + rest, third + 3 * first * rest
    return moments[2] / width**3 + 3 * moments[1] / width**2 + 3 * moments[0] / width + 1


@given(st.integers(1, 40), st.integers(0, 100))
@settings(max_examples=25)
def test_neither_order_nor_tiles_matter(tile: int, seed: int) -> None:
    x, y = normal(25, 3, seed).float(), normal(31, 3, seed + 1).float()
    order = torch.randperm(25, generator=torch.Generator().manual_seed(seed))
    clusters = [i // 4 for i in range(25)], [i // 5 for i in range(31)]
    moved = [clusters[0][i] for i in order], clusters[1]
    cubic = metrics.polynomial
    assert metrics.mmd(x[order], y, cubic, moved, tile=tile) == pytest.approx(metrics.mmd(x, y, cubic, clusters), abs=1e-10)
    assert metrics.mmd(y, x, cubic, clusters[::-1]) == pytest.approx(metrics.mmd(x, y, cubic, clusters), abs=1e-10)
    assert metrics.frechet(x[order], y).value == pytest.approx(metrics.frechet(x, y).value, rel=1e-9)
    for measure in (manifold.precision_recall, manifold.density_coverage):
        assert measure(x[order], y, 3, tile) == pytest.approx(measure(x, y, 3))


def test_neighbours_are_those_of_sklearn() -> None:
    x, y, k = normal(60, 4, 16), 0.8 * normal(45, 4, 17) + 0.4, 5
    near_x = NearestNeighbors(n_neighbors=k + 1).fit(x.numpy()).kneighbors(x.numpy())[0][:, -1]
    near_y = NearestNeighbors(n_neighbors=k + 1).fit(y.numpy()).kneighbors(y.numpy())[0][:, -1]
    assert manifold.radii(x, k).sqrt().numpy() == pytest.approx(near_x)
    apart = np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=-1)
    precision, recall = (apart <= near_x[:, None]).any(0).mean(), (apart <= near_y[None]).any(1).mean()
    assert manifold.precision_recall(x, y, k) == pytest.approx((precision, recall))
    density, coverage = (apart <= near_x[:, None]).sum() / (k * 45), (apart <= near_x[:, None]).any(1).mean()
    assert manifold.density_coverage(x, y, k) == pytest.approx((density, coverage))
    assert 0 < recall < precision and 0 < coverage < 1  # the example tells them apart


def test_density_and_coverage_of_one_distribution_have_their_expected_values() -> None:
    n, k = 50, 3
    found = np.array([manifold.density_coverage(normal(n, 2, i), normal(n, 2, 900 + i), k) for i in range(200)])
    share = math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    for values, expected in zip(found.T, (1.0, 1 - share), strict=True):
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(200)


@pytest.mark.parametrize("tile", [7, 2048])
def test_counts_which_tie_everywhere_are_compared_as_whole_numbers(tile: int) -> None:
    rng, k = np.random.default_rng(22), 3
    x, y = rng.integers(0, 3, (60, 5)), rng.integers(0, 4, (50, 5))
    apart = ((x[:, None] - y[None]) ** 2).sum(-1)  # integers: nothing is rounded
    own = [np.sort(((z[:, None] - z[None]) ** 2).sum(-1), axis=1)[:, k] for z in (x, y)]
    inside = apart <= own[0][:, None]
    real, fake = (torch.from_numpy(z).float() for z in (x, y))
    recall = (apart <= own[1][None]).any(1).mean()
    assert manifold.precision_recall(real, fake, k, tile) == pytest.approx((inside.any(0).mean(), recall))
    assert manifold.density_coverage(real, fake, k, tile) == pytest.approx((inside.sum() / (k * 50), inside.any(1).mean()))


def test_manifolds_of_sets_that_share_all_or_nothing() -> None:
    x = normal(30, 5, 18).float() + 100  # far from the origin, where careless distances drown
    assert manifold.precision_recall(x, x) == (1, 1) and manifold.density_coverage(x, x)[1] == 1
    assert manifold.precision_recall(x, x + 50) == (0, 0) and manifold.density_coverage(x, x + 50) == (0, 0)
    one = x[:1].repeat(30, 1)  # a model that draws one picture, and that one well
    assert manifold.precision_recall(x, one).precision == 1 and manifold.precision_recall(x, one).recall <= 0.05
    assert manifold.precision_recall(one, one) == (1, 1)  # balls of no size hold what is equal


def test_distances_far_from_the_origin_and_between_copies_are_not_lost_to_rounding() -> None:
    x = normal(40, 7, 20)
    assert manifold.radii(x + 1e7, 3).numpy() == pytest.approx(manifold.radii(x, 3).numpy(), rel=1e-6)
    assert metrics.squared_distances(x, x).diagonal().abs().max() == 0
    twice = torch.cat([x, x])[torch.randperm(80, generator=torch.Generator().manual_seed(21))]
    assert manifold.radii(twice, 1).max() == 0 and manifold.radii(twice, 2).min() > 0
    assert manifold.precision_recall(twice, x, 1) == (1, 1)


GOOD = normal(8, 3, 19)
BAD = {
    "look at image 2": torch.where(torch.arange(8)[:, None] == 2, torch.nan, GOOD),
    "look at image 0": torch.full((8, 3), torch.inf),
    "from one network": GOOD[:, :2],
    "images, features": GOOD[0],
    r"not \(0, 3\)": GOOD[:0],
    "floating point": torch.ones(8, 3, dtype=torch.int64),
}
MEASURES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "frechet": metrics.frechet,
    "kid": metrics.kid,
    "cmmd": metrics.cmmd,
    "precision_recall": manifold.precision_recall,
    "density_coverage": manifold.density_coverage,
}


@pytest.mark.parametrize("said", BAD)
@pytest.mark.parametrize("name", MEASURES)
def test_features_that_cannot_be_are_refused(name: str, said: str) -> None:
    for pair in ((GOOD, BAD[said]), (BAD[said], GOOD)):
        with pytest.raises(ValueError, match=said):
            MEASURES[name](*pair)


def refusals() -> list[tuple[str, Callable[[], object]]]:
    few = list(range(8))
    return [
        ("at least two points", lambda: metrics.frechet(GOOD, GOOD[:1])),
        ("those before it 3", lambda: metrics.moments(GOOD[:, :2], metrics.moments(GOOD))),
        ("three images", lambda: metrics.kid(GOOD, GOOD[:2])),
        ("three prompts", lambda: metrics.kid(GOOD, GOOD, ([0, 1] * 4, few))),
        ("8 and 7 for 8 and 8", lambda: metrics.kid(GOOD, GOOD, (few, few[:7]))),
        ("one prompt is alone", lambda: metrics.kid(GOOD, GOOD, (few, [*few[:7], 99]))),
        ("bandwidth", lambda: metrics.mmd_rbf(GOOD, GOOD, 0.0)),
        ("length 0 .image 7", lambda: metrics.cmmd(GOOD, torch.cat([GOOD[:7], torch.zeros(1, 3)]))),
        ("k must be", lambda: manifold.precision_recall(GOOD, GOOD[:5], 5)),
        ("k must be", lambda: manifold.density_coverage(GOOD, GOOD, 0)),
        ("k must be", lambda: manifold.density_coverage(GOOD, GOOD, 8)),
    ]


@pytest.mark.parametrize(("said", "act"), refusals())
def test_what_cannot_be_measured_is_refused(said: str, act: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=said):
        act()


def test_few_points_of_many_dimensions_take_the_short_way_to_the_same_distance() -> None:
    draw = torch.Generator().manual_seed(3)
    a, b = torch.randn(12, 40, generator=draw), 2 * torch.randn(9, 40, generator=draw) + 1
    long = metrics.frechet(metrics.moments(a), metrics.moments(b)).value
    assert metrics.frechet(a, b).value == pytest.approx(long, rel=1e-7) == metrics.frechet(b, a).value
    assert metrics.frechet(a, a).value == pytest.approx(0, abs=1e-4)
