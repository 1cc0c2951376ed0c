"""Intervals: exact where the answer is known, honest about clusters, and covering what they say."""

import numpy as np
import pytest

from fewstep.evaluate.statistics import (
    OVERALL,
    Estimate,
    bootstrap,
    over_runs,
    paired,
    percentiles,
    resampling,
    shares,
    unseen,
    with_bounds,
)
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS, TASKS

EVERY = [task for task in TASKS for _ in range(5)]


def correlated(prompts: int, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Verdicts whose seeds agree within a prompt: half of the prompts nearly always right, half nearly never."""
    easy = rng.random((prompts, 1)) < 0.5
    return rng.random((prompts, seeds)) < np.where(easy, 0.95, 0.05)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_verdicts_that_all_agree_have_no_width(value: float) -> None:
    estimates = bootstrap(np.full((len(EVERY), 4), value), EVERY, draws=200)
    assert set(estimates) == {*TASKS, OVERALL}
    assert all(e == Estimate(value, value, value) for e in estimates.values())


def test_an_arm_differs_from_itself_by_exactly_nothing() -> None:
    verdicts = np.random.default_rng(0).random((len(EVERY), 4)) < 0.6
    assert all(e == Estimate(0.0, 0.0, 0.0) for e in paired(verdicts, verdicts, EVERY, draws=200).values())


def test_overall_is_the_mean_of_the_six_tasks() -> None:
    rng = np.random.default_rng(1)
    tasks = [task for task in TASKS for _ in range(3 + TASKS.index(task))]
    estimates = bootstrap(rng.random((len(tasks), 2)) < 0.5, tasks, draws=100)
    assert estimates[OVERALL].mean == pytest.approx(
        np.mean([estimates[t].mean for t in GENEVAL_TASKS]), abs=1e-15
    )
    assert OVERALL not in bootstrap(np.ones((2, 1)), ["colors", "position"], draws=10)


def test_tasks_are_resampled_independently() -> None:
    """Six tasks with the same verdicts: the overall interval is narrower than a task's by the root of six."""
    own = np.random.default_rng(6).random((100, 1)) < 0.5
    estimates = bootstrap(np.vstack([own] * 6), [task for task in GENEVAL_TASKS for _ in range(100)])
    widths = {name: e.hi - e.lo for name, e in estimates.items()}
    assert widths["colors"] / widths[OVERALL] == pytest.approx(np.sqrt(6), rel=0.1)


def test_means_are_plain_means_and_lie_in_their_interval() -> None:
    values = np.array([[1, 0], [1, 1], [0, 0], [1, 0]])
    estimate = bootstrap(values, ["a"] * 4)["a"]
    assert estimate.mean == 0.5
    assert estimate.lo < 0.5 < estimate.hi


def test_two_prompts_have_three_outcomes_with_known_shares() -> None:
    """Of two prompts, 0 and 1, draws average 0, 1/2, 1 with shares 1/4, 1/2, 1/4: the quartiles are known."""
    drawn = resampling(2, 40_000, 0, 0) @ np.array([0.0, 1.0]) / 2
    assert np.mean(drawn == 0.5) == pytest.approx(0.5, abs=0.01)
    assert percentiles(drawn, level=0.95) == (0.0, 1.0)
    assert percentiles(drawn, level=0.40) == (0.5, 0.5)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    tasks, covered = ["a"] * 60, 0
    for trial in range(400):
        estimate = bootstrap(correlated(60, 4, rng), tasks, draws=400, seed=trial)["a"]
        covered += estimate.lo <= 0.5 <= estimate.hi
    assert 0.91 <= covered / 400 <= 0.98  # 0.95 less what a percentile interval misses at 60 prompts


def test_seeds_that_agree_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    clustered = correlated(100, 8, rng)
    shuffled = rng.permutation(clustered.ravel()).reshape(clustered.shape)
    widths = [e.hi - e.lo for e in (bootstrap(v, ["a"] * 100)["a"] for v in (clustered, shuffled))]
    # design effect: sqrt(1 + (m - 1) rho), here sqrt(1 + 7 * 0.81) = 2.6
    assert 2.0 < widths[0] / widths[1] < 3.2


def test_pairing_narrows_the_interval_of_arms_that_fail_alike() -> None:
    rng = np.random.default_rng(4)
    a = correlated(100, 4, rng)
    b = a & (rng.random(a.shape) < 0.95)
    estimate, alone = paired(a, b, ["a"] * 100)["a"], bootstrap(a, ["a"] * 100)["a"]
    assert estimate.mean == pytest.approx(a.mean() - b.mean(), abs=1e-15)
    assert estimate.hi - estimate.lo < 0.5 * (alone.hi - alone.lo)
    assert estimate.lo >= 0.0  # b is never right where a is wrong


def test_same_seed_same_interval_and_order_of_seeds_does_not_matter() -> None:
    verdicts = correlated(40, 4, np.random.default_rng(5))
    assert bootstrap(verdicts, ["a"] * 40) == bootstrap(verdicts[:, ::-1], ["a"] * 40)
    assert bootstrap(verdicts, ["a"] * 40) != bootstrap(verdicts, ["a"] * 40, seed=1)


def test_shares_of_prompts() -> None:
    values = np.array([[1, 1], [1, 0], [0, 0], [0, 1]])
    assert shares(values, ["a"] * 4)["a"] == (0.75, 0.25)
    every = shares(np.ones((len(EVERY), 2)), EVERY)
    assert every[OVERALL] == (1.0, 1.0)


def test_what_is_not_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match="3 prompts"):
        bootstrap(np.ones((4, 2)), ["a"] * 3)
    with pytest.raises(ValueError, match="same prompts and seeds"):
        paired(np.ones((4, 2)), np.ones((4, 3)), ["a"] * 4)


def test_a_share_never_has_an_end_below_zero_or_above_one() -> None:
    for count in range(10, 40):
        values = np.zeros((count, 4))
        values[3, 1] = 1  # one image in all: the lower end is 0, not a rounding error below it
        lowest, highest = (bootstrap(v, ["colors"] * count, 500)["colors"] for v in (values, 1 - values))
        assert lowest.lo >= 0 and highest.hi <= 1
        assert not str(lowest.lo).startswith("-")


def test_over_runs_of_one_run_is_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((12, 3)) < 0.5
    tasks = [task for task in GENEVAL_TASKS for _ in range(2)]
    one, many = bootstrap(right, tasks), over_runs(right[None], tasks)
    for name, estimate in one.items():
        assert many[name] == pytest.approx(estimate, abs=1e-9)


def test_over_runs_holds_what_runs_differ_by() -> None:
    """All prompts agree within a run and runs do not: the deviation of the mean is that of their own over root R."""
    shares = (0.2, 0.4, 0.5, 0.6, 0.6, 0.8)
    right = np.stack([np.full((40, 2), share) for share in shares])
    estimate = over_runs(right, ["colors"] * 40)["colors"]
    deviation = np.std(shares, ddof=1) / np.sqrt(len(shares))
    assert estimate.mean == pytest.approx(np.mean(shares))
    assert estimate.hi - estimate.lo == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    with pytest.raises(ValueError, match="runs, prompts, seeds"):
        over_runs(right[0], ["colors"] * 40)


def test_the_bound_of_prompts_that_agree_is_clopper_and_pearsons() -> None:
    from scipy.stats import binomtest

    for n in (1, 12, 60):
        for right in (0, n):
            expected = binomtest(right, n).proportion_ci(0.95, "exact")
            assert unseen(right / n, n, 0, 1) == pytest.approx((right / n, expected.low, expected.high))
    mean, lo, hi = unseen(0.0, 60, -1, 1)  # differences: an exception may go either way
    assert mean == 0 and -lo == hi == pytest.approx(1 - 0.025 ** (1 / 60))


def test_bounds_stand_only_where_no_prompt_differs() -> None:
    values = np.ones((len(EVERY), 2))
    found = with_bounds(bootstrap(values, EVERY, draws=50), values, EVERY, 0, 1)
    assert found["colors"].lo == pytest.approx(0.025 ** (1 / 5)) and found[OVERALL].lo == pytest.approx(0.025 ** (1 / 30))
    values[EVERY.index("colors"), 0] = 0
    plain = bootstrap(values, EVERY, draws=50)
    found = with_bounds(plain, values, EVERY, 0, 1)
    assert found["colors"] == plain["colors"] and found[OVERALL] == plain[OVERALL] and found["position"].lo < 1


def test_tasks_that_agree_inside_but_not_with_each_other_have_a_bound_that_holds_them_all() -> None:
    """One pooled bound is too narrow there: it puts what was not seen evenly into tasks that differ."""
    from scipy.stats import binomtest

    def overall(values: np.ndarray, tasks: list[str]) -> Estimate:
        return with_bounds(bootstrap(values, tasks, draws=50), values, tasks, 0, 1)[OVERALL]

    few = overall(np.array([[1], [1], [0], [1], [0], [1]], float), list(GENEVAL_TASKS))
    exact = binomtest(4, 6).proportion_ci(0.95, "exact")
    assert few.mean == pytest.approx(4 / 6) and few.lo <= exact.low and exact.high <= few.hi
    twelve = [task for task in GENEVAL_TASKS for _ in range(12)]
    one_fails = overall(np.array([[float(task != GENEVAL_TASKS[2])] * 2 for task in twelve]), twelve)
    alone = unseen(0.0, 12, 0, 1).hi  # the task that failed may be right that often, and no other below 1
    assert one_fails.hi >= (5 + alone) / 6 and one_fails.lo < one_fails.mean == pytest.approx(5 / 6)

    rng, held = np.random.default_rng(0), 0
    for _ in range(200):  # the whole is right on 50 %, each task on its own share
        right = (rng.random((6, 1)) < np.linspace(0.1, 0.9, 6)[:, None]).astype(float)
        estimate = overall(right, list(GENEVAL_TASKS))
        held += estimate.lo <= 0.5 <= estimate.hi
    assert held / 200 >= 0.95


def test_bounds_help_where_hardly_anything_fails() -> None:
    """Not to 95 %: a benchmark that shows a single failure has a percentile interval, which is too short."""
    rng, held, plain = np.random.default_rng(0), 0, 0
    for _ in range(300):
        right = rng.random((80, 4)) < rng.beta(2.97, 0.03, (80, 1))  # right on 99 %, correlation 1 / 4
        found = bootstrap(right, ["t"] * 80, draws=300)
        e, before = with_bounds(found, right, ["t"] * 80, 0, 1)["t"], found["t"]
        held, plain = held + (e.lo <= 0.99 <= e.hi), plain + (before.lo <= 0.99 <= before.hi)
    assert held / 300 > 0.85 and held - plain > 15, (held, plain)
