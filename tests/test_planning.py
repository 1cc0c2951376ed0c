"""Planning and p-values: against statsmodels and scipy, by simulation, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower, normal_sample_size_one_tail

from fewstep.evaluate import planning, statistics
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

Array = NDArray[np.float64]


def verdicts(rng: np.random.Generator, prompts: int, seeds: int, share: float, correlation: float) -> Array:
    """Beta-binomial: each prompt has its own share; two images of a prompt correlate by `correlation`."""
    scale = 1 / correlation - 1
    own = rng.beta(share * scale, (1 - share) * scale, (prompts, 1))
    return (rng.random((prompts, seeds)) < own).astype(float)


def six_tasks(prompts: int) -> list[str]:
    return [task for task in GENEVAL_TASKS for _ in range(prompts)]


def test_holm_is_that_of_statsmodels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels collects garbage in every call, which takes most of the test
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 12) * 8:
        p_values = rng.beta(0.3, 1, count).round(int(rng.integers(1, 9)))  # with ties, zeros and ones
        expected = multipletests(p_values, method="holm")[1]
        assert planning.holm(list(p_values)) == pytest.approx(list(expected), abs=1e-12)


def test_holm_by_hand_and_at_its_ends() -> None:
    assert planning.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert planning.holm([]) == [] and planning.holm([0.2]) == [0.2]
    for wrong in ([0.1, math.nan], [-0.1], [1.5]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            planning.holm(wrong)


@pytest.mark.parametrize("effect", [0.02, 0.1, 0.3, 0.8])
@pytest.mark.parametrize(("level", "power"), [(0.05, 0.8), (0.01, 0.9)])
def test_numbers_of_prompts_are_those_of_the_t_test(effect: float, level: float, power: float) -> None:
    sd = 0.35
    found = planning.prompts_for_difference(-effect * sd, sd, level, power)
    exact = TTestPower().solve_power(effect_size=effect, alpha=level, power=power)
    assert abs(found - exact) <= 1.2  # rounded up, and Guenther's correction leaves a fifth of a prompt
    normal = normal_sample_size_one_tail(effect * sd, power, level / 2, std_null=sd)
    assert found == math.ceil(normal + stats.norm.ppf(1 - level / 2) ** 2 / 2)


@given(st.integers(5, 100_000), st.floats(0.01, 10), st.floats(0.002, 0.2), st.floats(0.5, 0.99))
def test_the_detectable_difference_is_the_inverse(prompts: int, sd: float, level: float, power: float) -> None:
    difference = planning.detectable_difference(prompts, sd, level, power)
    assert planning.prompts_for_difference(difference, sd, level, power) == prompts


def test_power_is_what_was_planned() -> None:
    """Arms with a known difference, as many prompts as asked for: the t-test finds it eight times in ten."""
    rng = np.random.default_rng(0)
    prompts = planning.prompts_for_difference(0.1, 0.3)
    found = stats.ttest_1samp(rng.normal(0.1, 0.3, (4000, prompts)), 0, axis=1).pvalue < 0.05
    assert abs(found.mean() - 0.8) < 4 * math.sqrt(0.16 / 4000)


def test_the_formula_is_the_spread_of_simulated_shares() -> None:
    rng = np.random.default_rng(1)
    means = [verdicts(rng, 60, 4, 0.7, 0.25).mean() for _ in range(3000)]
    assert planning.standard_error(0.7, 60, 4, 0.25) == pytest.approx(np.std(means), rel=0.05)
    assert planning.standard_error(0.5, 100, 1, 0.3) == pytest.approx(0.05)  # one seed: the binomial's own
    assert planning.standard_error(0.5, 100, 8, 1.0) == pytest.approx(0.05)  # seeds that agree say nothing new
    assert planning.design_effect(4, 0.25) == 1.75 and planning.design_effect(1, 0.25) == 1.0


@pytest.mark.parametrize("correlation", [0.15, 0.3, 0.6])
def test_the_correlation_within_prompts_is_recovered(correlation: float) -> None:
    rng = np.random.default_rng(2)
    found = [planning.intra_prompt_correlation(verdicts(rng, 200, 4, 0.6, correlation)) for _ in range(100)]
    assert np.mean(found) == pytest.approx(correlation, abs=4 * np.std(found) / 10 + 0.002)  # its bias is below 1 / prompts


def test_the_correlation_is_that_of_the_textbook_and_has_its_ends() -> None:
    values = np.random.default_rng(3).normal(size=(8, 3)) + np.arange(8)[:, None]
    f = stats.f_oneway(*values).statistic
    assert planning.intra_prompt_correlation(values) == pytest.approx((f - 1) / (f + 2))
    assert planning.intra_prompt_correlation([[0, 0, 0], [1, 1, 1]]) == pytest.approx(1)
    assert planning.intra_prompt_correlation([[0, 1], [1, 0]]) == pytest.approx(-1)  # -1 / (m - 1)
    assert planning.intra_prompt_correlation(np.ones((5, 4))) == 0


def test_tasks_of_other_difficulty_do_not_count_as_correlation_within_a_task() -> None:
    rng = np.random.default_rng(4)
    values = np.concatenate([verdicts(rng, 400, 4, share, 0.2) for share in (0.1, 0.5, 0.95)])
    tasks = ["hard"] * 400 + ["fair"] * 400 + ["easy"] * 400
    assert planning.intra_prompt_correlation(values) > 0.45
    assert planning.intra_prompt_correlation(values, tasks) == pytest.approx(0.2, abs=0.04)
    three = [str(i % 40) for i in range(120)]
    small = [planning.intra_prompt_correlation(verdicts(rng, 120, 4, 0.5, 0.2), three) for _ in range(100)]
    assert np.mean(small) == pytest.approx(0.2, abs=4 * np.std(small) / 10)  # each task's mean costs a degree of freedom


def test_a_measured_spread_gives_the_standard_error_of_the_mean_of_tasks() -> None:
    """The interval of `statistics.paired` and sd / sqrt(n) are two ways to the same number."""
    rng = np.random.default_rng(5)
    tasks = [task for task, n in zip(GENEVAL_TASKS, (80, 99, 80, 94, 100, 100), strict=True) for _ in range(n)]
    a, b = (verdicts(rng, len(tasks), 4, 0.7, 0.25) for _ in range(2))
    sd, found = planning.per_prompt_sd(a, b, tasks), statistics.paired(a, b, tasks)
    assert list(sd) == list(found)
    for name, estimate in found.items():
        prompts = len(tasks) if name == "overall" else tasks.count(name)
        assert (estimate.hi - estimate.lo) / 2 == pytest.approx(1.96 * sd[name] / math.sqrt(prompts), rel=0.05)


def test_the_assumed_spread_is_that_of_simulated_arms() -> None:
    rng = np.random.default_rng(6)
    a, b = (verdicts(rng, 20_000, 4, 0.7, 0.25) for _ in range(2))
    assert planning.assumed_sd(0.7, 4, 0.25) == pytest.approx(planning.per_prompt_sd(a, b, ["t"] * 20_000)["t"], rel=0.02)
    assert planning.assumed_sd(0.7, 4, 0.25, between_arms=1) == 0
    shared = rng.normal(size=(20_000, 1))
    c, d = (shared + rng.normal(size=(20_000, 1)) for _ in range(2))  # correlation 0.5, variance 2
    half = planning.assumed_sd(0.5, 1, 0, between_arms=0.5) / planning.assumed_sd(0.5, 1, 0)
    assert half == pytest.approx(planning.per_prompt_sd(c, d, ["t"] * 20_000)["t"] / math.sqrt(4), rel=0.02)


def test_p_values_of_equal_arms_are_uniform() -> None:
    """Scores without ties: exactly so. Verdicts, full of ties: below a level no oftener than it says."""
    rng, tasks, repeats = np.random.default_rng(7), six_tasks(12), 400
    found: dict[tuple[str, bool], list[float]] = {}
    for repeat in range(repeats):
        ease = rng.beta(2, 1, (72, 1))  # shared by the arms: some prompts are easier
        for ties in (False, True):
            a, b = ((rng.random((72, 4)) < ease) if ties else ease + rng.exponential(size=(72, 4)) for _ in range(2))
            for name, p in planning.paired_p_value(a, b, tasks, draws=299, seed=repeat % 2).items():
                found.setdefault((name, ties), []).append(p)
    for (name, ties), p_values in found.items():
        for level in (0.05, 0.2, 0.5):
            apart = np.mean(np.array(p_values) <= level) - level
            room = 4 * math.sqrt(level * (1 - level) / repeats)
            assert apart < room and (ties or apart > -room), (name, ties, level)
    for name in (GENEVAL_TASKS[0], "overall"):
        assert stats.kstest(found[name, False], "uniform").pvalue > 0.01


def test_p_values_agree_with_an_enumeration_of_all_swaps() -> None:
    a = np.array([[1.0, 1], [1, 0], [1, 1], [0, 1], [1, 1], [0, 0], [1, 1], [1, 0]])
    b = np.array([[0.0, 1], [0, 0], [1, 0], [0, 0], [1, 1], [1, 0], [0, 0], [1, 0]])
    d = (a - b).mean(axis=1)
    signs = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1)
    exact = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9)
    found = planning.paired_p_value(a, b, ["t"] * 8, draws=40_000)["t"]
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))


def test_p_values_at_their_ends_and_in_either_order() -> None:
    rng, tasks = np.random.default_rng(8), six_tasks(20)
    a = verdicts(rng, 120, 4, 0.6, 0.2)
    assert set(planning.paired_p_value(a, a, tasks, draws=99).values()) == {1.0}
    assert planning.paired_p_value(a + 1, a, tasks, draws=99)["overall"] == 0.01  # 1 / (draws + 1)
    b = verdicts(rng, 120, 4, 0.6, 0.2)
    assert planning.paired_p_value(a, b, tasks, draws=99) == planning.paired_p_value(b, a, tasks, draws=99)
    assert "overall" not in planning.paired_p_value(a[:20], b[:20], tasks[:20], draws=99)


def refusals() -> list[tuple[str, object]]:
    good, tasks = np.ones((4, 2)), ["t"] * 4

    def both(a: object, b: object, names: Sequence[str]) -> object:
        return lambda: planning.paired_p_value(a, b, names, draws=9)  # type: ignore[arg-type]

    return [
        ("finite", both(np.full((4, 2), np.nan), good, tasks)),
        ("same prompts", both(good, good[:3], tasks)),
        ("same prompts", both(good, good, tasks[:3])),
        ("prompts, seeds", both(np.ones(4), good, tasks)),
        ("prompts, seeds", both(np.ones((0, 2)), np.ones((0, 2)), [])),
        ("needs draws", lambda: planning.paired_p_value(good, good, tasks, draws=0)),
        ("one prompt", lambda: planning.per_prompt_sd(good, good, ["a", "a", "a", "b"])),
        ("two seeds", lambda: planning.intra_prompt_correlation(np.ones((4, 1)))),
        ("more prompts than tasks", lambda: planning.intra_prompt_correlation(good, list("abcd"))),
        ("as many tasks", lambda: planning.intra_prompt_correlation(good, ["a"])),
        ("finite and not 0", lambda: planning.prompts_for_difference(0.0, 0.3)),
        ("finite and not 0", lambda: planning.prompts_for_difference(math.nan, 0.3)),
        ("spread", lambda: planning.prompts_for_difference(0.1, -1)),
        ("probabilities", lambda: planning.prompts_for_difference(0.1, 0.3, power=1.0)),
        ("probabilities", lambda: planning.detectable_difference(100, 0.3, level=0.0)),
        ("at least 5 prompts", lambda: planning.detectable_difference(4, 0.3)),
        ("at least 6 prompts", lambda: planning.detectable_difference(5, 0.3, level=0.001)),
        ("0 to 1", lambda: planning.standard_error(1.2, 10, 4, 0.2)),
        ("correlation", lambda: planning.design_effect(4, 1.5)),
        ("correlation", lambda: planning.design_effect(0, 0.5)),
        ("between arms", lambda: planning.assumed_sd(0.5, 4, 0.2, between_arms=2)),
    ]


@pytest.mark.parametrize(("said", "act"), refusals())
def test_what_cannot_be_planned_is_refused(said: str, act: object) -> None:
    with pytest.raises(ValueError, match=said):
        act()  # type: ignore[operator]
