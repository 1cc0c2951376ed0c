"""How many prompts an answer needs, and how sure one is: spread between prompts, p-values, several comparisons at once.

The unit is the prompt, as in `statistics`. With n prompts, m seeds of each, a share p of right images and a correlation rho
between images of one prompt, the squared standard error of the share is

    p (1 - p) / (n m) * (1 + (m - 1) rho)

so more prompts beat more seeds as soon as rho > 0: with rho = 0.25, four seeds of a prompt are worth 2.3 independent images,
and a hundred seeds 3.9.
Textbook formulas (Kish's design effect, the correlation of one-way analysis of variance, Holm's procedure); the
pairing and the mean over tasks are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.evaluate.statistics import DRAWS, OVERALL
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

LEVEL, POWER = 0.05, 0.8
FEWEST = 5  # prompts; below, the normal approximation means nothing


def design_effect(seeds: int, correlation: float) -> float:
    """How much larger the variance of a mean is than if all images were independent: 1 + (m - 1) rho.

    Raises:
        ValueError: no seeds, or a correlation that cannot be.
    """
    if seeds < 1 or not -1 / max(seeds - 1, 1) - 1e-9 <= correlation <= 1:
        raise ValueError(f"{seeds} seeds of a prompt cannot have the correlation {correlation}: give it from 0 to 1")
    return 1 + (seeds - 1) * correlation


def standard_error(share: float, prompts: int, seeds: int, correlation: float) -> float:
    """Standard error of a share of right images before anything is measured; the formula above.

    Raises:
        ValueError: a share outside 0 to 1, no prompts or no seeds, or a correlation that cannot be.
    """
    if not 0 <= share <= 1 or prompts < 1:
        raise ValueError(f"a share must be 0 to 1 of at least one prompt, not {share} of {prompts}")
    return math.sqrt(share * (1 - share) / (prompts * seeds) * design_effect(seeds, correlation))


def assumed_sd(share: float, seeds: int, correlation: float, between_arms: float = 0.0) -> float:
    """What `per_prompt_sd` would find, before anything is measured.

    Args:
        share: of right images, about the same in both arms.
        seeds: images of each prompt.
        correlation: between images of one prompt (0.15 to 0.3 within a task of GenEval, by its own human labels).
        between_arms: correlation of the two arms' means of a prompt; 0 is the cautious choice. A student and its teacher
            on the same noise have much in common.

    Raises:
        ValueError: a number out of range.
    """
    if not -1 <= between_arms <= 1:
        raise ValueError(f"a correlation between arms must be -1 to 1, not {between_arms}")
    return standard_error(share, 1, seeds, correlation) * math.sqrt(2 * (1 - between_arms))


def intra_prompt_correlation(values: ArrayLike, tasks: Sequence[str] | None = None) -> float:
    """Correlation rho between images of one prompt, by one-way analysis of variance.

    Args:
        values: (prompts, seeds): verdicts or scores.
        tasks: the task of each prompt; then the correlation is that within a task, which is smaller, because tasks differ.

    Returns:
        From -1 / (m - 1) to 1; slightly negative by chance where there is none; 0 where nothing varies.

    Raises:
        ValueError: not (prompts, seeds), fewer than two seeds, or not more prompts than tasks.
    """
    array = _matrix(values)
    names = ["all"] * len(array) if tasks is None else list(tasks)
    if len(names) != len(array):
        raise ValueError(f"values of {len(array)} prompts need as many tasks, not {len(names)}")
    count, seeds = array.shape
    groups = list(dict.fromkeys(names))
    if seeds < 2 or count <= len(groups):
        raise ValueError(f"needs two seeds and more prompts than tasks, not {array.shape} in {len(groups)} tasks")
    means = array.mean(axis=1)
    middle = np.zeros(count)
    for name in groups:
        own = np.array([n == name for n in names])
        middle[own] = means[own].mean()
    between = seeds * ((means - middle) ** 2).sum() / (count - len(groups))
    within = ((array - means[:, None]) ** 2).sum() / (count * (seeds - 1))
    if between + within < 1e-24:
        return 0.0
    return float((between - within) / (between + (seeds - 1) * within))


def per_prompt_sd(a: ArrayLike, b: ArrayLike, tasks: Sequence[str]) -> dict[str, float]:
    """Standard deviation of a prompt's difference a - b, averaged over its seeds: what `prompts_for_difference` needs.

    Args:
        a, b: (prompts, seeds) of the two arms, on the same prompts, seeds and noise.
        tasks: the task of each prompt.

    Returns:
        One number a task, and "overall" if all six GenEval tasks are there: scaled so that sd / sqrt(all prompts) is the
        standard error of the mean of the six tasks, at these shares of prompts.

    Raises:
        ValueError: shapes that differ or do not fit, or a task with one prompt, which has no spread.
    """
    found: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for name, rows in _by_task(a, b, tasks).items():
        if len(rows) < 2:
            raise ValueError(f"task {name} has one prompt: a spread between prompts needs two")
        found[name], sizes[name] = float(rows.std(ddof=1)), len(rows)
    if set(GENEVAL_TASKS) <= set(found):
        squared = sum(found[t] ** 2 / sizes[t] for t in GENEVAL_TASKS) / len(GENEVAL_TASKS) ** 2
        found[OVERALL] = math.sqrt(squared * sum(sizes[t] for t in GENEVAL_TASKS))
    return found


def prompts_for_difference(difference: float, per_prompt_sd: float, level: float = LEVEL, power: float = POWER) -> int:
    """Prompts needed to find a difference of two arms on the same prompts, seeds and noise.

    Args:
        difference: to be found; its sign does not matter.
        per_prompt_sd: from `per_prompt_sd` if measured, or from `assumed_sd`.
        level: of the two-sided test.
        power: chance to find the difference if it is there.

    Returns:
        ((z_level + z_power) sd / difference)^2, with Guenther's z^2 / 2 for a standard deviation that is itself estimated,
        rounded up; at least 5. For "overall": of all tasks together.

    Raises:
        ValueError: no difference, a negative spread, or a level or power that is no probability.
    """
    if not (math.isfinite(difference) and difference != 0 and math.isfinite(per_prompt_sd) and per_prompt_sd >= 0):
        raise ValueError(f"a difference must be finite and not 0, a spread 0 or more: got {difference} and {per_prompt_sd}")
    test, both = _quantiles(level, power)
    needed = (both * per_prompt_sd / difference) ** 2 + test**2 / 2
    return max(FEWEST, math.ceil(needed - 1e-9))


def detectable_difference(prompts: int, per_prompt_sd: float, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest difference that so many prompts find; the inverse of `prompts_for_difference`.

    Raises:
        ValueError: fewer than 5 prompts (more at levels below 0.002), a negative spread, or a level or power that is no
            probability.
    """
    test, both = _quantiles(level, power)
    fewest = max(FEWEST, math.floor(test**2 / 2) + 1)
    if prompts < fewest or not (math.isfinite(per_prompt_sd) and per_prompt_sd >= 0):
        raise ValueError(f"needs at least {fewest} prompts and a spread of 0 or more, got {prompts} and {per_prompt_sd}")
    return both * per_prompt_sd / math.sqrt(prompts - test**2 / 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for being several (Holm): calling those below a level different errs, in any, that often at most.

    Args:
        p_values: one of each comparison.

    Returns:
        In the order given.

    Raises:
        ValueError: a number outside 0 to 1.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1 or not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError(f"p-values must be a list of numbers from 0 to 1, not {list(p_values)}")
    order = np.argsort(given, kind="stable")
    stepped = np.maximum.accumulate(given[order] * np.arange(len(given), 0, -1)) if len(given) else given
    out = np.empty_like(given)
    out[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in out]


def paired_p_value(
    a: ArrayLike, b: ArrayLike, tasks: Sequence[str], draws: int = DRAWS, seed: int = 0
) -> dict[str, float]:
    """Two-sided p-value that two arms are equal, by swapping the arms prompt by prompt (a sign-flip permutation test).

    A prompt's seeds are swapped together. Exact, for any number of prompts, if the arms answer each prompt alike; with many
    prompts it also holds if only the means are equal. "overall" is cautious where tasks differ in opposite directions.
    It usually agrees with the interval of `statistics.paired`, but need not: they are two methods.

    Args:
        a, b: (prompts, seeds) of the two arms, on the same prompts, seeds and noise.
        tasks: the task of each prompt.
        draws: random swaps; the smallest p-value is 1 / (draws + 1).
        seed: of the swaps; comparisons with the same prompts get the same ones.

    Returns:
        One p-value a task, and "overall", for the mean of the six GenEval tasks, if all six are there.

    Raises:
        ValueError: shapes that differ or do not fit, values that are not finite, or no draws.
    """
    if draws < 1:
        raise ValueError(f"a permutation test needs draws, not {draws}")
    observed: dict[str, float] = {}
    swapped: dict[str, NDArray[np.float64]] = {}
    for stream, (name, rows) in enumerate(_by_task(a, b, tasks).items()):
        observed[name] = float(rows.mean())
        swapped[name] = _signs(len(rows), draws, seed, stream) @ rows / len(rows)
    if set(GENEVAL_TASKS) <= set(observed):
        observed[OVERALL] = float(np.mean([observed[t] for t in GENEVAL_TASKS]))
        swapped[OVERALL] = np.mean([swapped[t] for t in GENEVAL_TASKS], axis=0)
    # equal sums of the same verdicts in another order differ in the last digit: they are ties
    as_large = {name: int((np.abs(swapped[name]) >= abs(observed[name]) - 1e-12).sum()) for name in observed}
    return {name: (1 + count) / (draws + 1) for name, count in as_large.items()}


@lru_cache(maxsize=9)
def _signs(count: int, draws: int, seed: int, stream: int) -> NDArray[np.float64]:
    """Random signs (draws, count)."""
    rng = np.random.default_rng([seed, stream, count, 2])
    signs = rng.integers(0, 2, (draws, count), dtype=np.int8).astype(np.float64) * 2 - 1
    signs.setflags(write=False)
    return signs


def _quantiles(level: float, power: float) -> tuple[float, float]:
    """Normal quantile of a two-sided test, and its sum with that of the power."""
    if not (0 < level < 1 and level < power < 1):
        raise ValueError(f"level and power must be probabilities, the power the larger: got {level} and {power}")
    test = NormalDist().inv_cdf(1 - level / 2)
    return test, test + NormalDist().inv_cdf(power)


def _matrix(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"values must be (prompts, seeds), not {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite: a score is missing or NaN")
    return array


def _by_task(a: ArrayLike, b: ArrayLike, tasks: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Differences of a prompt's means, task by task."""
    first, second = _matrix(a), _matrix(b)
    if first.shape != second.shape or len(first) != len(tasks):
        raise ValueError(f"needs the same prompts and seeds, with a task each: {first.shape}, {second.shape}, {len(tasks)}")
    rows: NDArray[np.float64] = (first - second).mean(axis=1)
    return {name: rows[np.array([t == name for t in tasks])] for name in dict.fromkeys(tasks)}
