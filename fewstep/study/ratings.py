"""Ratings from votes: Bradley-Terry with intervals that know that votes on one prompt, and votes of one person, are alike.

Point estimates: weighted logistic regression; ties and "both bad" are half a win for each side. Intervals: the two-way
cluster-robust sandwich of Cameron, Gelbach and Miller (2011), prompts + annotators - their intersection, with t quantiles of
the smaller number of clusters. In our simulation (`study.simulate`) the usual interval, which takes votes for independent,
covers about three quarters where it claims 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from fewstep.study.planning import ELO, numbered

ANCHORED = 1000.0  # rating of the anchor
LEVEL = 0.95
CHOICES = ("a", "b", "tie", "both_bad")
STEPS = 100  # of Newton; a handful are needed
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Table(NamedTuple):
    """Votes of one question as columns of numbers, (N,) each.

    Attributes:
        arms: their names; `first` and `second` are places in it.
        first: the arm that a pair calls a.
        second: the one it calls b.
        score: 1 where a was chosen, 0 where b was, 0.5 otherwise.
        tied: whether the vote was a tie or "both bad".
        bad: whether it was "both bad".
        left: whether a was shown on the left.
        prompt: number of the prompt's cluster, 0 and up.
        annotator: number of the annotator's cluster.
    """

    arms: tuple[str, ...]
    first: Ints
    second: Ints
    score: Floats
    tied: NDArray[np.bool_]
    bad: NDArray[np.bool_]
    left: NDArray[np.bool_]
    prompt: Ints
    annotator: Ints

    def part(self, chosen: NDArray[np.bool_]) -> Table:
        """Some of the votes; arms stay."""
        columns: dict[str, Any] = {name: getattr(self, name)[chosen] for name in self._fields[1:]}
        return Table(self.arms, **columns)


class Covariance(NamedTuple):
    """Of K coefficients, (K, K) each.

    Attributes:
        both: prompts + annotators - intersection, negative eigenvalues set to 0.
        floors: one-way matrices that no variance may fall below; empty where `both` needed no repair.
        plain: as if votes were independent.
        freedom: degrees of freedom of its t quantiles.
        note: what it leaves out, where it had to, as the beginning of a sentence; else empty.
    """

    both: Floats
    floors: tuple[Floats, ...]
    plain: Floats
    freedom: int
    note: str

    def error(self, direction: Floats) -> float:
        """Standard error of a linear combination, `direction` (K,)."""
        variances = [float(direction @ v @ direction) for v in (self.both, *self.floors)]
        return math.sqrt(max(0.0, *variances))

    def quantile(self, level: float = LEVEL) -> float:
        """Half width of an interval in standard errors."""
        return float(stats.t.ppf((1 + level) / 2, self.freedom))

    def p_value(self, value: float, error: float) -> float:
        """Two-sided p-value of a value against 0."""
        return 2 * float(stats.t.sf(abs(value) / error, self.freedom)) if error > 0 else float(value == 0)


class Rating(NamedTuple):
    """One arm on the Elo scale: `rating` (None where the votes do not fix it, `note` says why), its interval, its votes."""

    arm: str
    rating: float | None
    lo: float | None
    hi: float | None
    votes: int
    note: str


class Share(NamedTuple):
    """A share of votes with its interval, 0 to 1, its p-value against a half, and the votes' design effect."""

    share: float
    lo: float
    hi: float
    votes: int
    p: float
    design_effect: float | None
    note: str


def table(votes: Sequence[Mapping[str, Any]], arms: Sequence[str] | None = None) -> Table:
    """Columns of votes.

    Args:
        votes: as the store gives them, of one question.
        arms: order of the arms; by default that of the alphabet.

    Raises:
        ValueError: a vote with an unknown choice or arm, or of an arm against itself; names it.
    """
    found = {v[key] for v in votes for key in ("arm_a", "arm_b")}
    names = tuple(arms) if arms is not None else tuple(sorted(found))
    place = {name: i for i, name in enumerate(names)}
    for v in votes:
        told = f"vote {v.get('vote_id')!r}"
        if v["choice"] not in CHOICES:
            raise ValueError(f"{told}: choice {v['choice']!r} is not one of {', '.join(CHOICES)}")
        if v["arm_a"] not in place or v["arm_b"] not in place:
            raise ValueError(f"{told}: {v['arm_a']!r} against {v['arm_b']!r}, but the arms are {', '.join(names)}")
        if v["arm_a"] == v["arm_b"]:
            raise ValueError(f"{told}: {v['arm_a']!r} against itself is no comparison")
    return Table(
        names,
        np.array([place[v["arm_a"]] for v in votes], dtype=np.int64),
        np.array([place[v["arm_b"]] for v in votes], dtype=np.int64),
        np.array([{"a": 1.0, "b": 0.0}.get(v["choice"], 0.5) for v in votes]),
        np.array([v["choice"] in ("tie", "both_bad") for v in votes], dtype=bool),
        np.array([v["choice"] == "both_bad" for v in votes], dtype=bool),
        np.array([bool(v["left_is_a"]) for v in votes], dtype=bool),
        numbered([v["prompt"] for v in votes]),
        numbered([v["annotator"] for v in votes]),
    )


def logit(x: Floats, y: Floats, weight: Floats | None = None) -> tuple[Floats, Floats]:
    """Weighted logistic regression by Newton's method.

    Args:
        x: (R, K) rows.
        y: (R,) 0 to 1; halves are fine.
        weight: (R,) votes that a row stands for.

    Returns:
        Coefficients (K,), and the information matrix (K, K) at them.

    Raises:
        ValueError: no finite maximum: some direction is never contradicted.
    """
    w = np.ones(len(y)) if weight is None else weight

    def at(beta: Floats) -> tuple[float, Floats, Floats]:
        eta = x @ beta
        p = special.expit(eta)
        value = float((w * (y * special.log_expit(eta) + (1 - y) * special.log_expit(-eta))).sum())
        return value, x.T @ (w * (y - p)), x.T @ (x * (w * p * (1 - p))[:, None])

    beta = maximum(at, x.shape[1], float(w.sum()))
    if beta is None:
        raise ValueError("the votes fix no finite value: one side is never contradicted")
    return beta, at(beta)[2]


def maximum(at: Callable[[Floats], tuple[float, Floats, Floats]], size: int, count: float) -> Floats | None:
    """Where a concave log likelihood is largest, (K,), by Newton's method; None where no finite coefficients are the best.

    Args:
        at: value, gradient (K,) and information (K, K) at some coefficients (K,), in logits.
        size: K.
        count: votes, for the precision.
    """
    beta = np.zeros(size)
    value, gradient, information = at(beta)
    for _ in range(STEPS):
        try:
            step = np.linalg.solve(information, gradient)
        except np.linalg.LinAlgError:
            return None
        if float(gradient @ step) < 1e-18 * max(1.0, count):
            return beta
        length = 1.0
        while (new := at(beta + length * step))[0] < value - 1e-9 and length > 1e-6:
            length /= 2
        beta = beta + length * step
        value, gradient, information = new
        if np.abs(beta).max() > 30:  # a factor of e^30 in odds: no number of votes fixes that
            return None
    return None


def two_way(scores: Floats, information: Floats, prompt: Ints, annotator: Ints) -> Covariance:
    """Cluster-robust covariance of coefficients, two-way (Cameron, Gelbach and Miller 2011).

    Each of the three parts carries G / (G - 1) * (N - 1) / (N - K) for its G clusters. A clustering with a single cluster
    cannot be used; the covariance then leaves it out and says so.

    Args:
        scores: (N, K): each vote's gradient of the log likelihood, at the maximum.
        information: (K, K).
        prompt: (N,) clusters.
        annotator: (N,) clusters.
    """
    count, size = scores.shape
    bread = np.asarray(np.linalg.inv(information), dtype=np.float64)
    cells = _numbered_pairs(prompt, annotator)
    kinds = {"prompt": prompt, "annotator": annotator}
    sizes = {name: len(np.unique(cluster)) for name, cluster in kinds.items()}
    usable = [name for name in kinds if sizes[name] > 1]
    plain = _sandwich(scores, bread, np.arange(count))
    if not usable:
        alone = "there is one prompt and one annotator: intervals speak of them alone"
        return Covariance(plain, (), plain, max(1, count - size), alone)
    ways = [_sandwich(scores, bread, kinds[name]) for name in usable]
    freedom = min(sizes[name] for name in usable) - 1
    if len(ways) == 1:
        single = "annotator: intervals say nothing of others" if usable == ["prompt"] else "prompt: they say nothing of others"
        return Covariance(ways[0], (), plain, freedom, f"there is one {single}")
    both: Floats = ways[0] + ways[1] - _sandwich(scores, bread, cells)
    values, vectors = np.linalg.eigh((both + both.T) / 2)
    repaired = bool(values.min() <= 1e-12 * max(values.max(), 0.0))
    both = (vectors * np.maximum(values, 0)) @ vectors.T
    return Covariance(both, tuple(ways) if repaired else (), plain, freedom, "")


def wins(votes: Table) -> Floats:
    """(A, A): how often the row's arm beat the column's, ties half each."""
    size = len(votes.arms)
    forward = np.bincount(votes.first * size + votes.second, votes.score, size * size)
    back = np.bincount(votes.second * size + votes.first, 1 - votes.score, size * size)
    return np.asarray(forward + back, dtype=np.float64).reshape(size, size)


def rated(matrix: Floats, anchor: int) -> tuple[list[int], dict[int, str]]:
    """Which arms have a finite rating against the anchor, and why others have none.

    A rating is finite among arms that are linked by wins both ways, directly or through others (Ford 1957).

    Args:
        matrix: (A, A) of `wins`.
        anchor: its place.
    """
    links = csr_matrix(matrix > 0)
    _, group = connected_components(links, directed=True, connection="strong")
    reach = _reaches(matrix > 0)
    why: dict[int, str] = {}
    for arm in range(len(matrix)):
        if group[arm] == group[anchor]:
            continue
        if matrix[arm].sum() + matrix[:, arm].sum() == 0:
            why[arm] = "no votes"
        elif reach[arm, anchor]:
            why[arm] = "never lost to the anchor's group, directly or through others: its rating has no upper end"
        elif reach[anchor, arm]:
            why[arm] = "never won against the anchor's group, directly or through others: its rating has no lower end"
        else:
            why[arm] = "no chain of votes links it with the anchor"
    return [arm for arm in range(len(matrix)) if group[arm] == group[anchor]], why


def strengths(matrix: Floats, anchor: int) -> Floats:
    """Bradley-Terry strengths in logits, (A,): the anchor's is 0, arms without a finite one are nan."""
    beta = np.full(len(matrix), np.nan)
    beta[anchor] = 0.0
    kept, _ = rated(matrix, anchor)
    free = [arm for arm in kept if arm != anchor]
    if free:
        rows = [(i, j) for k, i in enumerate(kept) for j in kept[k + 1 :] if matrix[i, j] + matrix[j, i] > 0]
        i, j = np.array(rows).T
        weight = matrix[i, j] + matrix[j, i]
        beta[free], _ = logit(design(i, j, free), matrix[i, j] / weight, weight)
    return beta


def bradley_terry(votes: Table, anchor: str, level: float = LEVEL) -> tuple[list[Rating], Covariance | None]:
    """Ratings of all arms: 1000 + 400 / ln 10 times the strength over the anchor's, which has no interval.

    Args:
        votes: of one question.
        anchor: arm that has 1000.
        level: of the intervals.

    Returns:
        A rating for each arm in `votes.arms`, and the covariance of the finite strengths (logits) but the anchor's.

    Raises:
        ValueError: the anchor is no arm.
    """
    if anchor not in votes.arms:
        raise ValueError(f"the anchor {anchor!r} is no arm of this study: {', '.join(votes.arms)}")
    base, matrix = votes.arms.index(anchor), wins(votes)
    kept, why = rated(matrix, base)
    beta, covariance = strengths(matrix, base), None
    free = [arm for arm in kept if arm != base]
    if free:
        inside = np.isin(votes.first, kept) & np.isin(votes.second, kept)
        own = votes.part(inside)
        x = design(own.first, own.second, free)
        p = special.expit(x @ beta[free])
        covariance = two_way(x * (own.score - p)[:, None], x.T @ (x * (p * (1 - p))[:, None]), own.prompt, own.annotator)
    appeared = np.bincount(votes.first, minlength=len(votes.arms)) + np.bincount(votes.second, minlength=len(votes.arms))
    out = []
    for arm, name in enumerate(votes.arms):
        rating = None if np.isnan(beta[arm]) else ANCHORED + ELO * float(beta[arm])
        half = None
        if covariance is not None and arm in free:
            half = ELO * covariance.quantile(level) * covariance.error(np.eye(len(free))[free.index(arm)])
        lo = rating - half if rating is not None and half is not None else None
        hi = rating + half if rating is not None and half is not None else None
        out.append(Rating(name, rating, lo, hi, int(appeared[arm]), why.get(arm, "")))
    return out, covariance


def share(score: Floats, prompt: Ints, annotator: Ints, level: float = LEVEL) -> Share:
    """A mean of scores, 0 to 1, with Wilson's interval for as many votes as the clusters leave, and a p-value against a half.

    Where all votes agree, the data say nothing about likeness; then prompts, or annotators if they are fewer, count as votes.

    Raises:
        ValueError: no votes.
    """
    count = len(score)
    if not count:
        raise ValueError("no votes: there is no share")
    mean = float(score.mean())
    fewest = min(len(np.unique(prompt)), len(np.unique(annotator)))
    if count == 1 or float(np.ptp(score)) == 0:
        effective, freedom, effect = float(fewest), max(1, fewest - 1), None
        note = "all votes agree" if count > 1 else "one vote"
    else:
        found = two_way((score - mean)[:, None], np.array([[float(count)]]), prompt, annotator)
        robust, plain = found.error(np.ones(1)) ** 2, float(found.plain[0, 0])
        robust = robust if robust > 0 else plain
        effective, freedom, note = mean * (1 - mean) / robust, found.freedom, found.note
        effect = robust / plain
    t = float(stats.t.ppf((1 + level) / 2, freedom))
    lo, hi = wilson(mean, effective, t)
    # the score test, so that interval and p-value agree: the variance is that of a half
    p = 2 * float(stats.t.sf(abs(mean - 0.5) / math.sqrt(0.25 / effective), freedom))
    return Share(mean, lo, hi, count, min(1.0, p), effect, note)


def wilson(mean: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share `mean` of `count` votes (it may be broken) at `quantile` standard errors."""
    z2 = quantile**2
    middle = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = quantile / (1 + z2 / count) * math.sqrt(max(0.0, mean * (1 - mean) / count + z2 / (4 * count**2)))
    return max(0.0, middle - half), min(1.0, middle + half)


def between(votes: Table, one: str, other: str, level: float = LEVEL) -> Share | None:
    """Share of the votes between two arms that went to `one`, ties half; None without votes."""
    i, j = votes.arms.index(one), votes.arms.index(other)
    forward, back = (votes.first == i) & (votes.second == j), (votes.first == j) & (votes.second == i)
    own = votes.part(forward | back)
    if not len(own.score):
        return None
    return share(np.where(own.first == i, own.score, 1 - own.score), own.prompt, own.annotator, level)


def design(first: Ints, second: Ints, free: Sequence[int]) -> Floats:
    """(R, K): 1 for the first arm and -1 for the second; arms that are not in `free`, such as the anchor, have no column."""
    columns = np.asarray(free)
    return (first[:, None] == columns).astype(np.float64) - (second[:, None] == columns)


def _sandwich(scores: Floats, bread: Floats, cluster: Ints) -> Floats:
    count, size = scores.shape
    codes = np.unique(cluster, return_inverse=True)[1]
    sums = np.stack([np.bincount(codes, scores[:, k]) for k in range(size)], axis=1)
    groups = len(sums)
    factor = groups / (groups - 1) * (count - 1) / max(1, count - size) if groups > 1 else 1.0
    out: Floats = bread @ (factor * sums.T @ sums) @ bread
    return out


def _reaches(links: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(A, A): whether wins lead from the row's arm to the column's."""
    reach = links.copy()
    for k in range(len(links)):
        reach |= reach[:, k : k + 1] & reach[k : k + 1]
    return reach


def _numbered_pairs(one: Ints, other: Ints) -> Ints:
    numbers = one * (int(other.max(initial=0)) + 1) + other
    return np.asarray(np.unique(numbers, return_inverse=True)[1], dtype=np.int64)
