"""Do 95 % intervals hold the truth in 95 of 100 studies? On the paper's design: 507 prompts × 4 seeds, 5 arms, 124 annotators.

FEWSTEP_STUDIES sets the number of simulated studies (400). Intervals of one study's four ratings are not independent; with
400 studies the binomial standard error of a coverage is at most 1.1 points if all four always agreed, and about 0.6 in fact.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from fewstep.study import ratings, simulate
from fewstep.study.planning import ELO

STUDIES = int(os.environ.get("FEWSTEP_STUDIES", "400"))


def test_two_way_intervals_cover_and_independent_ones_do_not() -> None:
    found = simulate.coverage(studies=STUDIES)
    assert 0.93 <= found["two_way"]["covers"] <= 0.97
    assert 0.68 <= found["independent"]["covers"] <= 0.80
    assert found["two_way"]["half_width"] > 1.5 * found["independent"]["half_width"]


def test_without_effects_both_intervals_cover_and_are_alike() -> None:
    none = simulate.Effects(0, 0, 0)
    found = simulate.coverage((0.0, 0.3), prompts=200, seeds=2, annotators=100, effects=none, studies=STUDIES)
    assert 0.92 <= found["two_way"]["covers"] <= 0.98 and 0.92 <= found["independent"]["covers"] <= 0.98
    assert found["two_way"]["half_width"] == pytest.approx(found["independent"]["half_width"], rel=0.08)


def test_few_annotators_are_not_overtrusted() -> None:
    """Six people with strong tastes: t quantiles with five degrees of freedom keep the interval honest."""
    tastes = simulate.Effects(prompt=0.3, image=0.0, annotator=0.8)
    found = simulate.coverage((0.0, 0.2, 0.0), prompts=60, seeds=2, annotators=6, effects=tastes, studies=STUDIES)
    assert found["two_way"]["covers"] >= 0.90
    assert found["independent"]["covers"] < 0.6


def test_shares_cover_too() -> None:
    effects = simulate.Effects()
    plan = simulate.design(["s", "t"], 200, 4, 30, 0)
    beta, rng = np.array([0.0, 0.8]), np.random.default_rng(5)
    true = 1 / (1 + np.exp(-simulate.truth(beta, effects)[1]))
    inside = []
    for _ in range(STUDIES):
        found = ratings.between(simulate.draw(plan, beta, effects, rng), "t", "s")
        assert found is not None
        inside.append(found.lo <= true <= found.hi)
    assert 0.92 <= np.mean(inside) <= 0.98


def test_the_truth_is_what_many_votes_say() -> None:
    effects = simulate.Effects(prompt=1.0, image=0.5, annotator=0.5, side=0.4, ties=0.2)
    beta = np.array([0.0, 1.0, -0.5])
    plan = simulate.design(["a", "b", "c"], 20_000, 1, 5_000, 3)
    votes = simulate.draw(plan, beta, effects, np.random.default_rng(3))
    assert votes.tied.mean() == pytest.approx(0.2, abs=0.01)
    found = ratings.strengths(ratings.wins(votes), 0)
    assert found == pytest.approx(simulate.truth(beta, effects), abs=0.04)
    assert abs(found[1]) < 0.7  # effects flatten: that is why the truth is not what was put in
    assert ELO == pytest.approx(173.717793)
