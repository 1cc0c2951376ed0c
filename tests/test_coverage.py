"""How often our intervals hold the truth, by simulation of a benchmark: why prompts, not images, are resampled.

Six tasks of unequal difficulty and, within a task, a correlation of 0.15 to 0.3 between images of one prompt, as in GenEval's
human labels; 80 prompts a task, four seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from fewstep.evaluate import planning, statistics
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

Array = NDArray[np.float64]
Arms = tuple[Array, Array, NDArray[np.float64]]

PROMPTS, SEEDS, BENCHMARKS, DRAWS = 80, 4, 2000, 400
SHARES = np.repeat((0.9, 0.8, 0.6, 0.85, 0.4, 0.55), PROMPTS)  # of right images, task by task
CORRELATIONS = np.repeat((0.2, 0.15, 0.3, 0.2, 0.25, 0.3), PROMPTS)
TASKS = [task for task in GENEVAL_TASKS for _ in range(PROMPTS)]
KEPT = 0.9  # of the teacher's right images a student gets right


def eases(rng: np.random.Generator) -> Array:
    """How often a model is right on each prompt: (benchmarks, prompts, 1)."""
    scale = 1 / CORRELATIONS - 1
    drawn = rng.beta(SHARES * scale, (1 - SHARES) * scale, (BENCHMARKS, len(SHARES)))
    return drawn[..., None]


def verdicts(ease: Array, chance: Array) -> Array:
    return (chance < ease).astype(np.float64)


@cache
def student_and_teacher() -> Arms:
    """The student fails where the teacher does and elsewhere too, prompt by prompt; half of the images share their luck."""
    rng = np.random.default_rng(0)
    ease, shape = eases(rng), (BENCHMARKS, len(SHARES), SEEDS)
    kept = rng.beta(6 * KEPT, 6 * (1 - KEPT), (BENCHMARKS, len(SHARES), 1))
    chance = rng.random(shape)
    other = np.where(rng.random(shape) < 0.5, chance, rng.random(shape))
    return verdicts(ease * kept, other), verdicts(ease, chance), (KEPT - 1) * SHARES


@cache
def two_models() -> Arms:
    """As good as each other, but good at other prompts."""
    rng = np.random.default_rng(1)
    a, b = (verdicts(eases(rng), rng.random((BENCHMARKS, len(SHARES), SEEDS))) for _ in range(2))
    return a, b, 0 * SHARES


@cache
def one_model() -> Arms:
    a, b, _ = two_models()
    return a, 0 * b, SHARES


def truths(by_prompt: Array) -> dict[str, float]:
    own = {task: float(by_prompt[TASKS.index(task)]) for task in GENEVAL_TASKS}
    return own | {"overall": float(np.mean(list(own.values())))}


@cache
def coverage(arms: Callable[[], Arms]) -> dict[str, float]:
    a, b, by_prompt = arms()
    truth, held = truths(by_prompt), dict.fromkeys((*GENEVAL_TASKS, "overall"), 0)
    for i in range(BENCHMARKS):  # ten sets of draws, so that none decides alone
        for name, found in statistics.paired(a[i], b[i], TASKS, DRAWS, seed=10 * i // BENCHMARKS).items():
            held[name] += found.lo <= truth[name] + 1e-12 and truth[name] - 1e-12 <= found.hi
    return {name: count / BENCHMARKS for name, count in held.items()}


def coverage_by_images(arms: Callable[[], Arms]) -> dict[str, float]:
    """Of the textbook's interval that takes images for independent."""
    a, b, by_prompt = arms()
    truth, differences = truths(by_prompt), (a - b).reshape(BENCHMARKS, 6, PROMPTS * SEEDS)
    means, squared = differences.mean(axis=2), differences.var(axis=2, ddof=1) / (PROMPTS * SEEDS)
    out = {}
    for k, task in enumerate(GENEVAL_TASKS):
        out[task] = float((np.abs(means[:, k] - truth[task]) < 1.96 * np.sqrt(squared[:, k])).mean())
    overall = np.abs(means.mean(axis=1) - truth["overall"]) < 1.96 * np.sqrt(squared.sum(axis=1)) / 6
    return out | {"overall": float(overall.mean())}


@pytest.mark.parametrize("arms", [student_and_teacher, two_models, one_model])
def test_intervals_over_prompts_hold_the_truth_as_often_as_they_say(arms: Callable[[], Arms]) -> None:
    found = coverage(arms)
    assert 0.93 <= found["overall"] <= 0.97
    assert 0.93 <= np.mean([found[task] for task in GENEVAL_TASKS]) <= 0.97
    assert min(found.values()) >= 0.91  # the task of nine in ten is skewed: see the limits below


@pytest.mark.parametrize("arms", [two_models, one_model])
def test_intervals_over_images_do_not(arms: Callable[[], Arms]) -> None:
    """Images of one prompt succeed and fail together: four of them are not four answers."""
    assert max(coverage_by_images(arms).values()) < 0.91
    assert coverage_by_images(arms)["overall"] < 0.90


def test_what_a_student_shares_with_its_teacher_cancels_and_with_it_most_of_the_correlation() -> None:
    """So a paired comparison needs fewer prompts, and there an interval over images is wrong by less."""
    student, teacher, _ = student_and_teacher()
    pairs = ((teacher[i], student[i] - teacher[i]) for i in range(20))
    rho = np.mean([[planning.intra_prompt_correlation(x, TASKS) for x in pair] for pair in pairs], axis=0)
    assert 0.18 < rho[0] < 0.28 and rho[1] < rho[0] / 2
    paired = np.mean([planning.per_prompt_sd(student[i], teacher[i], TASKS)["overall"] for i in range(50)])
    apart = np.mean([planning.per_prompt_sd(*(x[i] for x in two_models()[:2]), TASKS)["overall"] for i in range(50)])
    assert planning.prompts_for_difference(0.03, paired) < planning.prompts_for_difference(0.03, apart) / 2


def test_the_limits_of_the_interval_are_known() -> None:
    """It is a tenth too short with 20 prompts (Student's t, and n for n - 1), and useless where hardly anything fails."""
    rng, held = np.random.default_rng(3), {0.6: 0, 0.98: 0}
    for share in held:
        ease = rng.beta(3 * share, 3 * (1 - share), (BENCHMARKS, 20, 1))
        answers = verdicts(ease, rng.random((BENCHMARKS, 20, SEEDS)))
        for i in range(BENCHMARKS):
            found = statistics.bootstrap(answers[i], ["t"] * 20, DRAWS, seed=10 * i // BENCHMARKS)["t"]
            held[share] += found.lo <= share <= found.hi
    assert 0.90 <= held[0.6] / BENCHMARKS <= 0.945
    assert held[0.98] / BENCHMARKS < 0.85  # many such benchmarks see no failure at all, and report no width
