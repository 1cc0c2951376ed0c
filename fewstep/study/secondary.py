"""What stands beside the ratings: a model with ties of their own, the pull of a side, and what each annotator changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from fewstep.study import ratings
from fewstep.study.planning import ELO
from fewstep.study.ratings import ANCHORED, LEVEL, Floats, Table


class Side(NamedTuple):
    """How often the left image would be chosen between equal arms, ties half: share, interval, p-value against a half."""

    share: float
    lo: float
    hi: float
    p: float
    note: str


class Davidson(NamedTuple):
    """Ratings by Davidson's model, where a tie is an answer of its own.

    Attributes:
        ratings: (A,) on the Elo scale, the anchor's 1000; nan where the votes do not fix one. A factor of ten in the odds of
            winning against losing, ties left out, is 400 points.
        half: (A,) half widths of the two-way intervals; 0 for the anchor.
        ties: share of ties between equal arms.
    """

    ratings: Floats
    half: Floats
    ties: float


def side(votes: Table, anchor: str, level: float = LEVEL) -> Side | None:
    """Pull of the left side, as an intercept beside the arms' strengths; None where the votes do not fix one.

    Args:
        votes: of one question.
        anchor: arm that the others are measured against; the answer does not depend on it where all arms are linked.
        level: of the interval.
    """
    base, matrix = votes.arms.index(anchor), ratings.wins(votes)
    kept, _ = ratings.rated(matrix, base)
    free = [arm for arm in kept if arm != base]
    own = votes.part(np.isin(votes.first, kept) & np.isin(votes.second, kept))
    if not free or not len(own.score):
        return None
    left = np.where(own.left, own.first, own.second)
    right = np.where(own.left, own.second, own.first)
    y = np.where(own.left, own.score, 1 - own.score)
    x = np.column_stack([np.ones(len(y)), ratings.design(left, right, free)])
    try:
        beta, information = ratings.logit(x, y)
        covariance = _covariance(x, y, beta, information, own)
    except (ValueError, np.linalg.LinAlgError):
        return None
    first = np.eye(len(beta))[0]
    error = covariance.error(first)
    ends = beta[0] + np.array([-1, 1]) * covariance.quantile(level) * error
    lo, hi = special.expit(ends)
    p = covariance.p_value(float(beta[0]), error)
    return Side(float(special.expit(beta[0])), float(lo), float(hi), p, covariance.note)


def davidson(votes: Table, anchor: str, level: float = LEVEL) -> Davidson | None:
    """Davidson's model (1970): win, tie and loss in the ratio sqrt(a / b) : nu : sqrt(b / a); "both bad" is a tie.

    Returns:
        None where there are no ties, or nothing else.
    """
    base, matrix = votes.arms.index(anchor), ratings.wins(votes)
    kept, _ = ratings.rated(matrix, base)
    free = [arm for arm in kept if arm != base]
    own = votes.part(np.isin(votes.first, kept) & np.isin(votes.second, kept))
    if not free or not own.tied.any() or own.tied.all():
        return None
    half = ratings.design(own.first, own.second, free) / 2
    answer = np.where(own.tied, 0.0, 2 * own.score - 1)  # 1 win, 0 tie, -1 loss
    fitted = _davidson(half, answer, own.tied)
    if fitted is None:
        return None
    theta, scores, information = fitted
    covariance = ratings.two_way(scores, information, own.prompt, own.annotator)
    out, width = np.full(len(votes.arms), np.nan), np.full(len(votes.arms), np.nan)
    out[base], width[base] = ANCHORED, 0.0
    for k, arm in enumerate(free):
        out[arm] = ANCHORED + ELO * theta[k]
        width[arm] = ELO * covariance.quantile(level) * covariance.error(np.eye(len(theta))[k])
    nu = float(np.exp(theta[-1]))
    return Davidson(out, width, nu / (2 + nu))


def without_each(votes: Table, anchor: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Range of each arm's rating when one annotator at a time is left out.

    Args:
        votes: of one question.
        anchor: has 1000.
        names: of the annotators, by their number in the table.

    Returns:
        For each arm: "arm", "lo", "hi" (None where no leaving-out gives a rating), "most" (the annotator who moves it most),
        "moves" (by how many points), "lost" (leavings-out after which it has no finite rating).
    """
    base, size = votes.arms.index(anchor), len(votes.arms)
    whole = ratings.wins(votes)
    beta = ratings.strengths(whole, base)
    people = int(votes.annotator.max(initial=-1)) + 1
    own = np.zeros((people, size, size))
    np.add.at(own, (votes.annotator, votes.first, votes.second), votes.score)
    np.add.at(own, (votes.annotator, votes.second, votes.first), 1 - votes.score)
    left = np.array([ratings.strengths(np.maximum(whole - o, 0), base) for o in own]).reshape(people, size)
    out: list[dict[str, Any]] = []
    for arm, name in enumerate(votes.arms):
        column = ELO * left[:, arm]
        known = np.isfinite(column)
        row: dict[str, Any] = {"arm": name, "lo": None, "hi": None, "most": None, "moves": None, "lost": int((~known).sum())}
        if known.any() and np.isfinite(beta[arm]):
            moved = np.where(known, np.abs(column - ELO * beta[arm]), -1)
            most = int(moved.argmax())
            row |= {"lo": ANCHORED + float(column[known].min()), "hi": ANCHORED + float(column[known].max())}
            row |= {"most": names[most], "moves": float(moved[most])}
        out.append(row)
    return out


def _covariance(x: Floats, y: Floats, beta: Floats, information: Floats, own: Table) -> ratings.Covariance:
    residual = y - special.expit(x @ beta)
    return ratings.two_way(x * residual[:, None], information, own.prompt, own.annotator)


def _davidson(half: Floats, answer: Floats, tied: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats] | None:
    """The multinomial likelihood's maximum; it is concave.

    Args:
        half: (N, K) half the design.
        answer: (N,) 1, 0, -1.
        tied: (N,).

    Returns:
        Strengths and log nu (K + 1,), scores of the votes (N, K + 1), information (K + 1, K + 1).
    """

    def at(theta: Floats) -> tuple[float, Floats, Floats]:
        p, scores, information = _davidson_at(half, answer, tied, theta)
        return _davidson_value(p, answer), scores.sum(axis=0), information

    theta = ratings.maximum(at, half.shape[1] + 1, len(answer))
    return None if theta is None else (theta, *_davidson_at(half, answer, tied, theta)[1:])


def _davidson_at(
    half: Floats, answer: Floats, tied: NDArray[np.bool_], theta: Floats
) -> tuple[Floats, Floats, Floats]:
    """Probabilities (N, 3) of win, tie and loss, scores and information."""
    eta = half @ theta[:-1]
    p = special.softmax(np.column_stack([eta, np.full(len(eta), theta[-1]), -eta]), axis=1)
    mean = p[:, 0] - p[:, 2]
    scores = np.column_stack([half * (answer - mean)[:, None], tied - p[:, 1]])
    spread = p[:, 0] + p[:, 2] - mean**2
    mixed = -mean * p[:, 1]
    corner = half.T @ mixed
    information = np.block(
        [
            [half.T @ (half * spread[:, None]), corner[:, None]],
            [corner[None, :], np.array([[float((p[:, 1] * (1 - p[:, 1])).sum())]])],
        ]
    )
    return p, scores, information


def _davidson_value(p: Floats, answer: Floats) -> float:
    chosen = p[np.arange(len(answer)), (1 - answer).astype(np.int64)]
    return float(np.log(np.maximum(chosen, 1e-300)).sum())
