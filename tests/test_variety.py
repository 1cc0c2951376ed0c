"""Variety within a prompt: closed forms, an independent implementation, and ratios to a reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch import Tensor

from fewstep.evaluate import statistics, variety
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_same_image_counts_once_and_images_with_nothing_in_common_count_each() -> None:
    same, apart = normal(1, 1, 6, seed=0).repeat(1, 4, 1), torch.eye(6)[:4][None]
    pairs = torch.eye(6)[[0, 0, 3, 3]][None]
    features = torch.cat([same, apart, 5 * apart, pairs])  # length does not matter
    assert variety.vendi(features) == pytest.approx([1, 4, 4, 2])
    assert variety.mean_distance(features) == pytest.approx([0, 1, 1, 2 / 3], abs=1e-12)
    root = math.sqrt(2)
    assert variety.mean_distance(features, cosine=False) == pytest.approx([0, root, 5 * root, root * 2 / 3], abs=1e-12)


def test_two_images_have_a_known_score() -> None:
    """Eigenvalues (1 +- c) / 2: the exponential of the entropy of a coin."""
    for angle in (0.1, 0.7, 1.5):
        c = math.cos(angle)
        features = torch.tensor([[[1.0, 0.0], [c, math.sin(angle)]]]).double()
        p, q = (1 + c) / 2, (1 - c) / 2
        assert variety.vendi(features)[0] == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)))
        assert variety.mean_distance(features)[0] == pytest.approx(1 - c)


def test_scores_are_those_of_singular_values_and_of_scipy() -> None:
    features = normal(5, 7, 4, seed=1)  # more seeds than dimensions: the kernel has eigenvalues of 0
    found = variety.vendi(features), variety.mean_distance(features), variety.mean_distance(features, cosine=False)
    for p, rows in enumerate(features.double().numpy()):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        shares = np.linalg.svd(unit / math.sqrt(7), compute_uv=False) ** 2
        assert found[0][p] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert found[1][p] == pytest.approx(pdist(rows, "cosine").mean())
        assert found[2][p] == pytest.approx(pdist(rows).mean())
    kernel = torch.from_numpy(np.exp(-((features[:, :, None] - features[:, None]) ** 2).sum(-1).numpy()))
    shares = np.linalg.eigvalsh(kernel[0].numpy() / 7)
    assert variety.vendi_of_kernel(kernel)[0] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=30)
def test_scores_stay_in_range_and_neither_order_nor_rotation_matters(seeds: int, width: int, seed: int) -> None:
    features = normal(3, seeds, width, seed=seed).double()
    scores = variety.vendi(features)
    assert ((scores > 1 - 1e-9) & (scores < min(seeds, width) + 1e-9)).all()
    turn = torch.linalg.qr(normal(width, width, seed=seed + 1).double()).Q
    for other in (features.flip(1), features @ turn):
        assert variety.vendi(other) == pytest.approx(scores)
        assert variety.mean_distance(other) == pytest.approx(variety.mean_distance(features))


def six_tasks(prompts: int) -> list[str]:
    return [task for task in GENEVAL_TASKS for _ in range(prompts)]


def test_an_arm_has_exactly_its_own_variety() -> None:
    features, tasks = normal(60, 4, 8, seed=2), six_tasks(10)
    for found in variety.varieties(features, features, tasks, draws=200).values():
        assert found.ratio == (1, 1, 1) and found.value == found.reference
    expected = statistics.bootstrap(variety.vendi(features)[:, None], tasks, draws=200)
    assert {name: v.value for name, v in variety.varieties(features, features, tasks, draws=200).items()} == expected


def test_a_collapsing_arm_is_found_with_its_size() -> None:
    """Seeds drawn half as far around their prompt's mean are half as far apart, whatever the prompt."""
    middle, around = normal(60, 1, 8, seed=3), normal(60, 4, 8, seed=4)
    arms = (middle + 0.5 * around, middle + around)
    found = variety.varieties(*arms, six_tasks(10), lambda x: variety.mean_distance(x, cosine=False), draws=200)
    assert list(found) == [*GENEVAL_TASKS, "overall"]
    for entry in found.values():
        assert entry.ratio == pytest.approx((0.5, 0.5, 0.5))  # prompts are resampled for both arms together
        assert entry.value.mean == pytest.approx(entry.reference.mean / 2) and entry.value.lo < entry.value.mean
    lost = variety.varieties(*arms, six_tasks(10), draws=200)["overall"]
    assert lost.ratio.hi < 1 and lost.value.hi < lost.reference.mean


def test_ratios_by_hand() -> None:
    found = variety.ratio([1.0, 3.0, 1.0], [2.0, 2.0, 4.0], ["a", "a", "b"], draws=400)
    assert found["a"].mean == 1.0 and found["a"][1:] == (0.5, 1.5)  # draws of two prompts: 1/2, 1 or 3/2
    assert found["b"] == (0.25, 0.25, 0.25) and "overall" not in found
    six = variety.ratio(np.arange(1.0, 7), np.ones(6), GENEVAL_TASKS, draws=10)
    assert six["overall"].mean == 3.5


def test_ratio_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(5), 0
    for trial in range(300):
        hard = rng.exponential(size=60)  # prompts leave more or less open, for both arms
        a, b = (scale * (hard + 0.5 * rng.exponential(size=60)) for scale in (0.8, 1.0))
        found = variety.ratio(a, b, ["t"] * 60, draws=400, seed=trial)["t"]
        held += found.lo <= 0.8 <= found.hi
    assert 0.91 <= held / 300 <= 0.98


GOOD = normal(3, 4, 5, seed=6)


def refusals() -> list[tuple[str, Callable[[], object]]]:
    broken, still, none = GOOD.clone(), GOOD.clone(), [1.0, 1.0, 1.0]
    broken[1, 2, 0], still[2, 1] = math.nan, 0.0
    eye = torch.eye(3)[None]
    uneven = torch.tensor([[[1.0, 0.9], [0.1, 1.0]]])
    return [
        ("two seeds", lambda: variety.vendi(GOOD[:, :1])),
        ("two seeds", lambda: variety.mean_distance(GOOD[0])),
        ("two seeds", lambda: variety.vendi(GOOD[:0])),
        ("finite", lambda: variety.vendi(broken)),
        ("finite", lambda: variety.mean_distance(broken, cosine=False)),
        ("floating point", lambda: variety.vendi(torch.ones(2, 2, 2, dtype=torch.int64))),
        ("length 0", lambda: variety.vendi(still)),
        ("prompts, seeds, seeds", lambda: variety.vendi_of_kernel(GOOD)),
        ("1 on its diagonal", lambda: variety.vendi_of_kernel(2 * eye)),
        ("1 on its diagonal", lambda: variety.vendi_of_kernel(eye * math.nan)),
        ("symmetric", lambda: variety.vendi_of_kernel(uneven)),
        ("semi-definite", lambda: variety.vendi_of_kernel(torch.full((1, 2, 2), 2.0) - torch.eye(2))),
        ("number of seeds", lambda: variety.varieties(GOOD, GOOD[:, :3], ["t"] * 3)),
        ("one number and task", lambda: variety.ratio(none, none[:2], ["t"] * 3)),
        ("one number and task", lambda: variety.ratio(none, none, ["t"] * 2)),
        ("one number and task", lambda: variety.ratio([], [], [])),
        ("finite", lambda: variety.ratio([1, 1, math.nan], none, ["t"] * 3)),
        ("not negative", lambda: variety.ratio(none, [1, 1, -1], ["t"] * 3)),
        ("no variety", lambda: variety.ratio(none, [0, 0, 0], ["t"] * 3)),
    ]


@pytest.mark.parametrize(("said", "act"), refusals())
def test_what_cannot_be_measured_is_refused(said: str, act: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=said):
        act()
