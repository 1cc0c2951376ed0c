"""Planning a study: sample sizes against exact power, likeness against what was put in, costs by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fewstep.evaluate import planning as evaluation
from fewstep.evaluate.planning import holm
from fewstep.study import analysis, planning, simulate


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
    assert (found.per_prompt, found.per_annotator) == (4, 1) and math.isnan(found.annotator)  # each gave one vote
    # and the design effect is how much more the mean scatters
    means = [(rng.random(len(prompt)) < rng.beta(spread / 2, spread / 2, prompts)[prompt]).mean() for _ in range(600)]
    assert np.var(means) / (0.25 / len(prompt)) == pytest.approx(1 + 3 * correlation, rel=0.15)
    assert planning.design_effect(found.prompt, 0.0, 4, 1) == pytest.approx(1 + 3 * correlation, rel=0.08)


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
    assert plan["pairs"] == plan["comparisons"] == 10 and plan["votes_per_pair"] == 2 * plan["independent_votes"]
    each = plan["votes_per_pair"]
    assert plan["independent_votes"] == planning.votes_needed(0.55, comparisons=10) > 785
    assert plan["counted_votes"] == each * 10 * 2
    assert plan["votes"] == math.ceil(each * 20 / 0.9) and plan["annotators"] == math.ceil(plan["votes"] / 100)
    assert plan["items_per_pair"] * 1.3 >= each > (plan["items_per_pair"] - 4) * 1.3
    assert plan["images"] == plan["items_per_pair"] * 5
    assert plan["hours"] == pytest.approx(plan["votes"] * 9 / 3600) and plan["cost"] == pytest.approx(15 * plan["hours"])
    assert plan["minutes_per_annotator"] == pytest.approx(plan["hours"] * 60 / plan["annotators"])
    assert plan["half_width_points"] == pytest.approx(100 * 1.959964 * math.sqrt(0.5 / each), rel=1e-3)
    assert plan["win_rates"]["0.52"] == 2 * planning.votes_needed(0.52, comparisons=10)
    alone = planning.describe(5, 0.55, 2.0, comparisons=1)
    assert alone["independent_votes"] == 785 and alone["win_rates"]["0.52"] == 4906 * 2
    text = planning.show(plan)
    for number in (f"{each:,}", f"{plan['votes']:,}", f"{plan['images']:,} images", "corrected for 10 pairs"):
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
        ({"seconds_per_vote": math.nan}, "seconds_per_vote"),
        ({"pay_per_hour": math.inf}, "pay_per_hour"),
        ({"votes_per_annotator": 0}, "votes_per_annotator must be 1"),
        ({"ties": 1.0}, "ties must be"),
        ({"checks": 1.0}, "checks"),
        ({"comparisons": 0}, "comparisons 1"),
    ],
)
def test_a_plan_that_cannot_be_says_why(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        planning.describe(**{"arms": 2, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("arms", [2, 3, 5])
def test_a_planned_study_has_its_power_in_the_verdict_of_the_report(arms: int) -> None:
    """One pair differs by what was to be seen; it is tested by Holm's correction among all pairs, as the report does."""
    votes = planning.describe(arms, design_effect=1.0)["votes_per_pair"]
    rng, pairs = np.random.default_rng(0), arms * (arms - 1) // 2
    rates = np.where(np.arange(pairs) == 0, 0.55, 0.5)
    won = rng.binomial(votes, rates, (4000, pairs)) / votes
    p = 2 * stats.norm.sf(np.abs(won - 0.5) / math.sqrt(0.25 / votes))
    power = np.mean([holm(list(row))[0] < 0.05 for row in p])
    assert 0.78 <= power <= 0.86


def test_what_more_votes_would_show_is_said_for_the_same_test() -> None:
    pair = {"votes": 1000, "design_effect": 1.0, "ties": 0.0}
    assert planning.detectable(1000, comparisons=10) > planning.detectable(1000)
    needed = planning.votes_needed(0.55, comparisons=10) - 1000
    assert f"about {needed:,} more would be needed to see 55 %" in analysis.more(pair, 10)
    assert "53 %" in analysis.more(pair, 1)


def test_likeness_is_that_of_images_where_clusters_have_one_size() -> None:
    values = np.random.default_rng(0).normal(size=(40, 1)) + np.random.default_rng(1).normal(size=(40, 3))
    other = evaluation.intra_prompt_correlation(values)
    assert planning.intraclass(values.ravel(), np.repeat(np.arange(40), 3)) == pytest.approx(other)


def test_a_pilot_tells_likeness_and_the_plan_tells_how_many_votes_share_it() -> None:
    arms, alike = {"s": 0.0, "t": 0.0}, simulate.Effects(prompt=1.2, image=0.2, annotator=0.2)
    asked = {"seeds": 2, "annotators": 10, "overlap": 0.0, "checks": 0.0, "effects": alike}
    votes = simulate.votes(arms, prompts=2000, **asked)  # type: ignore[arg-type]
    found = planning.pilot(votes)["quality"]
    assert found == planning.likeness(votes) and found.per_prompt == 2
    larger = planning.likeness(simulate.votes(arms, prompts=1000, **{**asked, "seeds": 6}))  # type: ignore[arg-type]
    assert found.prompt == pytest.approx(larger.prompt, abs=0.06)  # the same people and prompts, whatever the design
    design = {"slots": {"quality": 6000, "adherence": 6000}, "contests": 1, "prompts": 1000, "annotators": 30}
    sizes = planning.sizes_of(design)
    assert sizes == (6, 200)
    assert planning.design_effect(found.prompt, 0, *sizes) == pytest.approx(1 + 5 * larger.prompt, abs=0.3)
    plan = planning.describe(3, checks=0.1, overlap=0.15)
    for_plan = planning.sizes_for(3, checks=0.1, overlap=0.15)
    assert for_plan.per_prompt == pytest.approx(plan["votes_per_pair"] / plan["prompts"], rel=0.01)
    each = plan["counted_votes"] / plan["annotators"] / plan["questions"] / plan["pairs"]
    assert for_plan.per_annotator == pytest.approx(each, rel=0.02)


def test_a_pilot_of_single_votes_does_not_pass_for_one_without_likeness() -> None:
    arms = {"s": 0.0, "t": 0.0}
    single = simulate.votes(arms, prompts=50, seeds=1, annotators=5, overlap=0, checks=0)
    assert math.isnan(planning.likeness(single).prompt)
    with pytest.raises(ValueError, match=r"do not tell how alike votes of one prompt are.*or --design-effect"):
        planning.pilot(single)
    with pytest.raises(ValueError, match="do not tell how alike votes of one annotator are"):
        planning.pilot(simulate.votes(arms, prompts=20, seeds=2, annotators=1, overlap=0, checks=0))
    with pytest.raises(ValueError, match="holds no votes"):
        planning.pilot([])


def test_a_made_study_says_what_it_can_show() -> None:
    design = {"contests": 3, "slots": {"quality": 3000, "adherence": 3000}, "gold": 0.05, "repeat": 0.05}
    said = planning.promised(design, 2.0, 9.0, 10.0)
    assert f"{100 * planning.detectable(500, comparisons=3):.1f} %" in said and "1,000 votes a pair" in said
    assert "6,667 votes" in said and "16.7 hours" in said and "167 at 10" in said
    assert "no win rate" in planning.promised({**design, "slots": {"quality": 9}})
    with pytest.raises(ValueError, match="design effect"):
        planning.promised(design, math.nan)


def test_the_guide_shows_what_is_printed() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    assert planning.show(planning.describe(3)) in guide
