"""Distances between sets of images: closed values, no bias where nothing differs, and intervals that hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewstep.evaluate import distances, metrics
from fewstep.worlds.shapes.scene import COLORS, SHAPES, SIZES


def drawn(rng: np.random.Generator, images: int, red: float = 1 / 8) -> list[list[list[object]]]:
    """Images of one to three objects; `red` is the share of red ones."""
    rest = [(1 - red) / 7] * 7
    return [
        [
            [SHAPES[rng.integers(4)], COLORS[rng.choice(8, p=[red, *rest])], SIZES[rng.integers(2)], int(rng.integers(9))]
            for _ in range(rng.integers(1, 4))
        ]
        for _ in range(images)
    ]


def test_total_variation_has_its_closed_values() -> None:
    a = np.array([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    b = np.array([[1.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    assert distances.total_variation(a, b).tolist() == [0.5, 1.0, 0.0]
    assert distances.total_variation(a[1], np.zeros(3)) == 1.0


def test_counts_say_what_is_shown() -> None:
    made = distances.counts([["circle", "red", "small", 4], ["circle", "blue", "large", 0]])
    assert made["shape"].tolist() == [2, 0, 0, 0] and made["size"].tolist() == [1, 1]
    assert made["cell"][[0, 4]].tolist() == [1, 1] and made["shape_color"].sum() == 2
    assert made["objects"].tolist() == [0, 0, 1, 0, 0, 0]
    assert distances.counts([["circle", "red", "small", 4]] * 9)["objects"].tolist() == [0, 0, 0, 0, 0, 1]


def test_the_same_images_are_at_no_distance() -> None:
    images = drawn(np.random.default_rng(0), 40)
    prompts = [i // 4 for i in range(40)]
    for found in distances.histograms(images, images, prompts, draws=50):
        assert (found.mean, found.lo, found.hi, found.floor) == (0, 0, 0, 0)
    shown = distances.counts_of(images)
    assert metrics.kid(shown, shown, (prompts, prompts)).mean == pytest.approx(0, abs=1e-12)


def test_a_share_that_differs_is_found_with_its_size_and_the_others_stay_at_the_floor() -> None:
    rng = np.random.default_rng(1)
    a, b = drawn(rng, 2000), drawn(rng, 2000, red=0.5)
    found = {d.attribute: d for d in distances.histograms(a, b, [i // 4 for i in range(2000)], draws=200)}
    assert found["color"].lo < 0.375 < found["color"].hi  # half of |.5 - .125| + 7 |.5 / 7 - .125|
    assert found["color"].mean > 5 * found["color"].floor
    for same in ("shape", "size", "cell", "objects"):
        assert found[same].mean < 3 * found[same].floor


def test_mmd_is_zero_on_average_for_one_distribution_and_positive_for_two() -> None:
    rng = np.random.default_rng(2)
    prompts = [i // 2 for i in range(60)]

    def apart(red: float) -> float:
        pair = (distances.counts_of(x) for x in (drawn(rng, 60), drawn(rng, 60, red)))
        return metrics.kid(*pair, (prompts, prompts)).mean

    same, other = [apart(1 / 8) for _ in range(60)], [apart(0.6) for _ in range(10)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(60)
    assert min(same) < 0 and np.mean(other) > 5 * np.std(same) / np.sqrt(10)


def test_wrong_sets_are_refused() -> None:
    images = drawn(np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match="two aligned sets"):
        distances.histograms(images, images[:3], [0, 0, 1, 1])


def test_energy_distance_of_gaussians_has_its_closed_value() -> None:
    """E|a - b| of two normals on a line is that of |N(m, s^2)|, in closed form."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3000, 1, generator=g), 2 + torch.randn(3000, 1, generator=g)

    def folded(m: float, s: float) -> float:
        normal = torch.distributions.Normal(0.0, 1.0)
        density = math.exp(-((m / s) ** 2) / 2) / math.sqrt(2 * math.pi)
        return 2 * s * density + m * (1 - 2 * float(normal.cdf(torch.tensor(-m / s))))

    s = math.sqrt(2)
    distance, cross = distances.energy_distance(a, b)
    assert cross == pytest.approx(folded(2, s), rel=0.02)
    assert distance == pytest.approx(2 * folded(2, s) - 2 * folded(0, s), rel=0.04)


def test_paired_energy_distance_of_a_set_with_itself_is_zero() -> None:
    a = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    assert distances.energy_distance(a, a, paired=True)[0] == pytest.approx(0.0, abs=1e-12)
    assert distances.energy_distance(a, a)[0] < 0  # the pairs of a point with itself count as distance 0


def test_energy_distance_refuses_what_it_cannot_compare() -> None:
    a = torch.zeros(3, 2)
    for b, paired in ((a[:1], False), (a[:2], True)):
        with pytest.raises(ValueError, match="at least two points"):
            distances.energy_distance(a, b, paired)
