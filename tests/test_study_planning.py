"""Planning a study: sample sizes against exact power, likeness against what was put in, costs by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fewstep.study import planning, simulate


@pytest.mark.parametrize(("rate", "votes"), [(0.55, 785), (0.53, 2181), (0.52, 4906), (0.45, 785)])
def test_votes_needed_are_those_of_the_literature(rate: float, votes: int) -> None:
    assert planning.votes_needed(rate) == votes


@pytest.mark.parametrize("rate", [0.53, 0.55, 0.6])
def test_so_many_votes_have_the_power_they_claim(rate: float) -> None:
    """The exact binomial power of the two-sided test at a half."""
    n = planning.votes_needed(rate)
    lowest = int(stats.binom.isf(0.025, n, 0.5)) + 1  # first count that is significant
    power = stats.binom.sf(lowest - 1, n, rate) + stats.binom.cdf(n - lowest, n, rate)
    assert power == pytest.approx(0.8, abs=0.02)


def test_detectable_is_the_way_back() -> None:
    for rate in (0.51, 0.55, 0.7):
        votes = planning.votes_needed(rate, ties=0.2)
        assert planning.detectable(votes, ties=0.2) <= rate < planning.detectable(votes - 1, ties=0.2)


def test_ties_scatter_less_and_more_comparisons_need_more() -> None:
    assert planning.votes_needed(0.55, ties=0.5) == math.ceil(planning.votes_needed(0.55) / 2)
    z = stats.norm.isf(0.0025) + stats.norm.isf(0.2)
    assert planning.votes_needed(0.55, comparisons=10) == math.ceil(z**2 / 4 / 0.05**2)


def test_the_expected_half_width_is_that_of_simulated_ratings() -> None:
    beta = np.zeros(4)
    none = simulate.Effects(0, 0, 0)
    found = simulate.coverage(beta, prompts=150, seeds=2, annotators=60, effects=none, studies=20)
    assert planning.half_width(300, 4) == pytest.approx(found["independent"]["half_width"], rel=0.03)


def test_likeness_finds_what_was_put_in() -> None:
    """Beta-binomial prompts: a share that varies with variance v has the correlation v / 0.25 between votes."""
    rng = np.random.default_rng(0)
    correlation, prompts, each = 0.2, 1500, 4
    spread = 1 / correlation - 1
    shares = rng.beta(spread / 2, spread / 2, prompts)
    prompt = np.repeat(np.arange(prompts), each)
    won = rng.random(len(prompt)) < shares[prompt]
    votes = [
        {"kind": "normal", "arm_a": "s", "arm_b": "t", "choice": "a" if w else "b", "prompt": int(p), "annotator": f"p{k}"}
        for k, (p, w) in enumerate(zip(prompt, won, strict=True))
    ]
    found = planning.likeness(votes)
    assert found.prompt == pytest.approx(correlation, abs=0.03)
    assert (found.annotator, found.per_prompt, found.per_annotator) == (0, 4, 1)
    # and the design effect is how much more the mean scatters
    means = [(rng.random(len(prompt)) < rng.beta(spread / 2, spread / 2, prompts)[prompt]).mean() for _ in range(600)]
    assert np.var(means) / (0.25 / len(prompt)) == pytest.approx(1 + 3 * correlation, rel=0.15)
    assert found.design_effect == pytest.approx(1 + 3 * correlation, rel=0.08)


def test_which_arm_a_pair_calls_a_does_not_matter() -> None:
    votes = simulate.votes({"s": 0.4, "t": 0.0}, prompts=60, seeds=3)
    turned = [
        v | {"arm_a": v["arm_b"], "arm_b": v["arm_a"], "choice": {"a": "b", "b": "a"}.get(v["choice"], v["choice"])}
        if i % 2
        else v
        for i, v in enumerate(votes)
    ]
    assert planning.likeness(turned) == pytest.approx(planning.likeness(votes))


def test_likeness_needs_votes_that_share_something() -> None:
    one = {"kind": "normal", "arm_a": "s", "arm_b": "t", "choice": "a", "prompt": 0, "annotator": "p0"}
    other = one | {"prompt": 1, "annotator": "p1", "choice": "b"}
    with pytest.raises(ValueError, match="share a prompt or an annotator"):
        planning.likeness([one, other])
    with pytest.raises(ValueError, match="pilot's votes, found 1"):
        planning.likeness([one, other | {"kind": "gold"}])


def test_a_correlation_of_identical_values_is_one_and_of_constants_zero() -> None:
    groups = np.repeat(np.arange(5), 3)
    assert planning.intraclass(groups.astype(float), groups) == 1
    assert planning.intraclass(np.ones(15), groups) == 0
    assert planning.cluster_size(np.array([0, 0, 0, 1])) == 2.5  # three have three, one has one


def test_a_plan_adds_up() -> None:
    plan = planning.describe(5, 0.55, 2.0, 9.0, 15.0, 100, seeds=4, questions=2, checks=0.1, overlap=0.15)
    assert plan["pairs"] == 10 and plan["independent_votes"] == 785 and plan["votes_per_pair"] == 1570
    assert plan["counted_votes"] == 1570 * 10 * 2
    assert plan["votes"] == math.ceil(31400 / 0.9) and plan["annotators"] == math.ceil(plan["votes"] / 100)
    assert plan["items_per_pair"] * 1.3 >= 1570 > (plan["items_per_pair"] - 4) * 1.3
    assert plan["images"] == plan["items_per_pair"] * 5
    assert plan["hours"] == pytest.approx(plan["votes"] * 9 / 3600) and plan["cost"] == pytest.approx(15 * plan["hours"])
    assert plan["minutes_per_annotator"] == pytest.approx(plan["hours"] * 60 / plan["annotators"])
    assert plan["half_width_points"] == pytest.approx(100 * 1.959964 * math.sqrt(0.25 / 785), rel=1e-3)
    assert plan["win_rates"]["0.52"] == 4906 * 2
    text = planning.show(plan)
    for number in ("785", "1,570", "34,889", "302 × 4", "6,040 images"):
        assert number in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": 1}, "arms must be 2"),
        ({"win_rate": 0.5}, "no difference"),
        ({"win_rate": 1.2}, "win_rate must be between"),
        ({"design_effect": 0.5}, "design effect must be 1"),
        ({"design_effect": math.nan}, "design effect must be 1"),
        ({"seconds_per_vote": 0}, "seconds_per_vote"),
        ({"votes_per_annotator": 0}, "votes_per_annotator must be 1"),
        ({"ties": 1.0}, "ties must be"),
        ({"checks": 1.0}, "checks"),
        ({"comparisons": 0}, "comparisons 1"),
    ],
)
def test_a_plan_that_cannot_be_says_why(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        planning.describe(**{"arms": 2, **change})  # type: ignore[arg-type]


def test_the_guide_shows_what_is_printed() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    assert planning.show(planning.describe(3)) in guide
