"""Means with intervals. The unit of resampling is the prompt: seeds of one prompt succeed and fail together.

Cluster bootstrap: within each task draw prompts with replacement, keep all their seeds, take the percentiles of
the mean over many draws. A comparison bootstraps the differences on the same prompts, seeds and initial noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

DRAWS = 10_000
LEVEL = 0.95
OVERALL = "overall"
RUNS = 1_000  # stream of the resampling of training runs


class Estimate(NamedTuple):
    """A mean and its percentile interval."""

    mean: float
    lo: float
    hi: float


class Shares(NamedTuple):
    """Shares of prompts with at least one seed right, and with all seeds right."""

    any_seed: float
    all_seeds: float


def bootstrap(
    values: ArrayLike, tasks: Sequence[str], draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> dict[str, Estimate]:
    """Mean and interval of every task, and overall.

    Args:
        values: (prompts, seeds): verdicts, or differences of two arms' verdicts.
        tasks: the task of each prompt.
        draws: bootstrap draws.
        seed: of the draws; arms with the same prompts get the same draws.
        level: coverage of the interval.

    Returns:
        One estimate a task, and "overall", the mean of the six GenEval tasks, if all six are there.

    Raises:
        ValueError: `values` is not (prompts, seeds), or not aligned with `tasks`.
    """
    rows, names = _prompt_means(values, tasks), list(dict.fromkeys(tasks))
    means: dict[str, float] = {}
    drawn: dict[str, NDArray[np.float64]] = {}
    for stream, name in enumerate(names):
        own = rows[np.array([t == name for t in tasks])]
        means[name] = float(own.mean())
        # Centred, so that prompts which all agree give their mean exactly.
        draw = own.mean() + resampling(len(own), draws, seed, stream) @ (own - own.mean()) / len(own)
        nearest = draw.round() + 0.0  # a share of 0 or 1 must not fall outside by a rounding error
        drawn[name] = np.where(np.abs(draw - nearest) < 1e-12, nearest, draw)
    if set(GENEVAL_TASKS) <= set(names):
        means[OVERALL] = float(np.mean([means[t] for t in GENEVAL_TASKS]))
        drawn[OVERALL] = np.mean([drawn[t] for t in GENEVAL_TASKS], axis=0)
    return {name: Estimate(means[name], *percentiles(drawn[name], level)) for name in drawn}


def paired(
    a: ArrayLike, b: ArrayLike, tasks: Sequence[str], draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> dict[str, Estimate]:
    """Mean of a - b with its interval, as `bootstrap`; both (prompts, seeds) on the same prompts, seeds and noise.

    Raises:
        ValueError: the shapes differ or do not fit `tasks`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a comparison needs the same prompts and seeds: {first.shape} and {second.shape}")
    return bootstrap(first - second, tasks, draws, seed, level)


def unseen(value: float, prompts: int, low: float, high: float, level: float = LEVEL) -> Estimate:
    """The interval of a mean where all of so many prompts gave one value: a bootstrap has no width there, but knows no more.

    Of n prompts without an exception, exceptions are at most u = 1 - ((1 - level) / 2)^(1 / n) of all prompts (Clopper and
    Pearson 1934), and an exception is anything from `low` to `high`: for n right verdicts that is their exact bound.

    Args:
        value: that all prompts gave.
        prompts: how many.
        low, high: what a prompt can give at all: 0 and 1 for verdicts, -1 and 1 for their differences.
        level: coverage of the interval; at least that.
    """
    rest = ((1 - level) / 2) ** (1 / prompts)
    return Estimate(value, rest * value + (1 - rest) * low, rest * value + (1 - rest) * high)


def with_bounds(
    estimates: dict[str, Estimate], values: ArrayLike, tasks: Sequence[str], low: float, high: float
) -> dict[str, Estimate]:
    """Estimates of `bootstrap`, with `unseen` where all prompts of a task agree; "overall" has a bound if they do in all six.

    If all six agree on one value, exceptions from it are at most as frequent, in the mean of the tasks, as in 6 n prompts of a
    single task, n those of the smallest (a geometric mean is at most the arithmetic one): `unseen` again. If each agrees on a
    value of its own, the mean lies between the means of the tasks' ends, each of a level at which all six hold together
    (Bonferroni): as sure as it says, and wider than it need be.

    Args:
        estimates, values, tasks: what came of them, and what `bootstrap` was given.
        low, high: as in `unseen`.
    """
    rows, names = _prompt_means(values, tasks), list(tasks)
    own = {name: rows[np.array([t == name for t in names])] for name in dict.fromkeys(names)}
    still = {name: len(x) for name, x in own.items() if np.ptp(x) < 1e-12}
    found = estimates | {name: unseen(estimates[name].mean, n, low, high) for name, n in still.items()}
    if OVERALL not in estimates or not set(GENEVAL_TASKS) <= set(still):
        return found
    count, mean = len(GENEVAL_TASKS), estimates[OVERALL].mean
    if np.ptp([estimates[t].mean for t in GENEVAL_TASKS]) < 1e-12:
        return found | {OVERALL: unseen(mean, count * min(still[t] for t in GENEVAL_TASKS), low, high)}
    level = 1 - (1 - LEVEL) / count
    parts = [unseen(estimates[t].mean, still[t], low, high, level) for t in GENEVAL_TASKS]
    return found | {OVERALL: Estimate(mean, float(np.mean([p.lo for p in parts])), float(np.mean([p.hi for p in parts])))}


def over_runs(
    values: ArrayLike, tasks: Sequence[str], draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> dict[str, Estimate]:
    """As `bootstrap`, for several training runs of one recipe: runs and prompts are both resampled.

    Args:
        values: (runs, prompts, seeds): verdicts, or differences of two recipes' verdicts, run by run.
        tasks, draws, seed, level: as in `bootstrap`.

    With a single run the interval is that of `bootstrap`: it says nothing about training. With two or three it says
    little: a percentile interval cannot know tails that so few runs do not show.

    Raises:
        ValueError: `values` is not (runs, prompts, seeds), or not aligned with `tasks`.
    """
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 3 or len(runs) == 0:
        raise ValueError(f"values must be (runs, prompts, seeds), not {runs.shape}")
    rows, names = np.stack([_prompt_means(run, tasks) for run in runs]), list(dict.fromkeys(tasks))
    count = len(rows)
    # drawing few runs with replacement keeps (R - 1) / R of their variance: what is lost is given back
    excess = resampling(count, draws, seed, RUNS) / count - 1 / count
    times = 1 / count + excess * (math.sqrt(count / (count - 1)) if count > 1 else 1.0)
    means: dict[str, float] = {}
    drawn: dict[str, NDArray[np.float64]] = {}
    for stream, name in enumerate(names):
        own = rows[:, np.array([t == name for t in tasks])]
        means[name] = float(own.mean())
        prompts = resampling(own.shape[1], draws, seed, stream) / own.shape[1]
        drawn[name] = means[name] + np.einsum("dr,rp,dp->d", times, own - own.mean(), prompts)
    if set(GENEVAL_TASKS) <= set(names):
        means[OVERALL] = float(np.mean([means[t] for t in GENEVAL_TASKS]))
        drawn[OVERALL] = np.mean([drawn[t] for t in GENEVAL_TASKS], axis=0)
    return {name: Estimate(means[name], *percentiles(drawn[name], level)) for name in drawn}


def shares(values: ArrayLike, tasks: Sequence[str]) -> dict[str, Shares]:
    """Shares of prompts right with at least one and with all seeds; tasks and overall as in `bootstrap`."""
    right, names = np.asarray(values, dtype=bool), list(dict.fromkeys(tasks))
    _prompt_means(values, tasks)
    out: dict[str, Shares] = {}
    for name in names:
        own = right[np.array([t == name for t in tasks])]
        out[name] = Shares(float(own.any(axis=1).mean()), float(own.all(axis=1).mean()))
    if set(GENEVAL_TASKS) <= set(names):
        out[OVERALL] = Shares(*(float(x) for x in np.mean([out[t] for t in GENEVAL_TASKS], axis=0)))
    return out


@lru_cache(maxsize=9)  # arms share their draws, and drawing is most of the work
def resampling(count: int, draws: int, seed: int, stream: int) -> NDArray[np.float64]:
    """How often each of `count` prompts comes up in each draw: (draws, count), rows sum to `count`.

    Tasks are resampled independently of each other: each has its own `stream`.
    """
    rng = np.random.default_rng([seed, stream, count])
    times = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    times.setflags(write=False)
    return times


def percentiles(draws: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """Ends of the central interval that holds `level` of the draws."""
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def _prompt_means(values: ArrayLike, tasks: Sequence[str]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != len(tasks) or 0 in array.shape:
        raise ValueError(f"values must be (prompts, seeds) with {len(tasks)} prompts, not {array.shape}")
    means: NDArray[np.float64] = array.mean(axis=1)
    return means
