"""Do people agree with each other, with gold answers, and with themselves? And who voted how often?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate import statistics
from fewstep.study import ratings
from fewstep.study.planning import numbered
from fewstep.study.ratings import Floats

Vote = Mapping[str, Any]
NOMINAL = ("a", "b", "tie", "both_bad")
ORDER = {"b": 0, "tie": 1, "both_bad": 1, "a": 2}  # from a's loss to its win
DRAWS = 2_000


def winner(vote: Vote) -> str:
    """The arm that was chosen, or "tie" or "both_bad"."""
    return str({"a": vote["arm_a"], "b": vote["arm_b"]}.get(vote["choice"], vote["choice"]))


def coincidences(values: Sequence[int], categories: int) -> Floats:
    """One item's part of Krippendorff's coincidence matrix, (C, C), from the m answers that it got.

    Every ordered pair of different answers counts 1 / (m - 1); an item with one answer adds nothing.
    """
    counts = np.bincount(values, minlength=categories).astype(np.float64)
    m = counts.sum()
    return (np.outer(counts, counts) - np.diag(counts)) / (m - 1) if m > 1 else np.zeros((categories, categories))


def alpha(matrix: Floats, ordinal: bool = False) -> float:
    """Krippendorff's alpha of a coincidence matrix (C, C), or of many (..., C, C); 1 is agreement, 0 is chance.

    nan where all answers are the same: there is nothing to agree on.
    """
    counts = matrix.sum(axis=-1)
    total = counts.sum(axis=-1)
    if ordinal:
        # squared number of answers from the middle of one category to the middle of the other
        middle = np.cumsum(counts, axis=-1) - counts / 2
        distance = (middle[..., :, None] - middle[..., None, :]) ** 2
    else:
        distance = np.broadcast_to(1 - np.eye(matrix.shape[-1]), matrix.shape)
    seen = (matrix * distance).sum(axis=(-2, -1))
    chance = (counts[..., :, None] * counts[..., None, :] * distance).sum(axis=(-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(chance > 0, 1 - (total - 1) * seen / chance, np.nan)
    return out if out.ndim else float(out)  # type: ignore[return-value]


def fleiss(counts: NDArray[np.int64]) -> float:
    """Fleiss' kappa.

    Args:
        counts: (items, C) answers of each kind; items may have different numbers, two or more.

    Returns:
        1 is agreement, 0 chance; nan where all answers are the same. Items of different size weigh the same.
    """
    n = counts.sum(axis=1)
    each = (counts * (counts - 1)).sum(axis=1) / (n * (n - 1))
    shares = counts.sum(axis=0) / counts.sum()
    chance = float((shares**2).sum())
    return float((each.mean() - chance) / (1 - chance)) if chance < 1 else float("nan")


def overlap(votes: Sequence[Vote]) -> list[list[Vote]]:
    """Votes of different people on the same item (pair of images and question), items with two or more only."""
    items: dict[tuple[str, int], dict[str, Vote]] = defaultdict(dict)
    for v in votes:
        if v["kind"] == "normal":
            items[v["question"], v["pair_id"]].setdefault(v["annotator"], v)
    return [list(item.values()) for item in items.values() if len(item) > 1]


def agree(votes: Sequence[Vote], draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Agreement on items that several people answered.

    Args:
        votes: of one question; only normal ones count.
        draws: of the bootstrap over prompts that gives the intervals.
        seed: of the draws.

    Returns:
        "items", "votes", "same" (share of pairs of people who gave the same answer), "fleiss", "nominal" and "ordinal", the
        last two with "alpha", "lo", "hi". Without overlap: "items" 0 and nothing else. Figures that are undefined are None.
    """
    items = overlap(votes)
    if not items:
        return {"items": 0, "votes": 0}
    prompt = numbered([item[0]["prompt"] for item in items])
    nominal = np.array([coincidences([NOMINAL.index(v["choice"]) for v in i], len(NOMINAL)) for i in items])
    ordinal = np.array([coincidences([ORDER[v["choice"]] for v in i], 3) for i in items])
    counts = np.array([np.bincount([NOMINAL.index(v["choice"]) for v in i], minlength=len(NOMINAL)) for i in items])
    n = counts.sum(axis=1)
    same = (counts * (counts - 1)).sum() / (n * (n - 1)).sum()
    out: dict[str, Any] = {"items": len(items), "votes": int(n.sum()), "same": float(same), "fleiss": _known(fleiss(counts))}
    for name, each in (("nominal", nominal), ("ordinal", ordinal)):
        size = each.shape[-1]
        sums = np.zeros((int(prompt.max()) + 1, size, size))
        np.add.at(sums, prompt, each)
        times = statistics.resampling(len(sums), draws, seed, 0)
        drawn = alpha((times @ sums.reshape(len(sums), -1)).reshape(draws, size, size), name == "ordinal")
        finite = np.asarray(drawn)[np.isfinite(drawn)]
        lo, hi = statistics.percentiles(finite) if len(finite) and len(sums) > 1 else (None, None)
        out[name] = {"alpha": _known(alpha(each.sum(axis=0), name == "ordinal")), "lo": lo, "hi": hi}
    return out


def gold(votes: Iterable[Vote]) -> dict[str, dict[str, int]]:
    """By annotator: how many gold pairs were "asked" and how many answers were "right"; a tie is wrong."""
    out: dict[str, dict[str, int]] = {}
    for v in votes:
        if v["kind"] == "gold":
            own = out.setdefault(v["annotator"], {"asked": 0, "right": 0})
            own["asked"] += 1
            own["right"] += v["choice"] == v["gold_answer"]
    return out


def gold_share(votes: Sequence[Vote]) -> dict[str, Any] | None:
    """Share of gold answers that were right, over all people, with its two-way interval; None without any."""
    asked = [v for v in votes if v["kind"] == "gold"]
    return _share([v["choice"] == v["gold_answer"] for v in asked], asked)


def repeats(votes: Sequence[Vote]) -> dict[str, Any] | None:
    """Do people answer a pair the same way when it comes again with sides swapped? None without such pairs.

    Returns:
        "same" (share with interval), "pairs", "opposite" (the other arm was chosen), "kept_side" (of these, those that chose
        the same side of the screen both times).
    """
    first = {v["vote_id"]: v for v in votes if v["kind"] == "normal"}
    pairs = [(first[v["repeat_of"]], v) for v in votes if v["kind"] == "repeat" and v["repeat_of"] in first]
    found = _share([winner(v) == winner(w) for v, w in pairs], [w for _, w in pairs])
    if found is None:
        return None
    decided = [(v, w) for v, w in pairs if v["choice"] in ("a", "b") and w["choice"] in ("a", "b")]
    opposite = [(v, w) for v, w in decided if winner(v) != winner(w)]
    return {
        "same": found,
        "pairs": len(pairs),
        "opposite": len(opposite),
        "kept_side": sum(_chose_left(v) == _chose_left(w) for v, w in opposite),
    }


def loads(votes: Iterable[Vote]) -> dict[str, Any]:
    """How evenly the votes are spread over people.

    Returns:
        "annotators", "most", "median", "gini" (0 is even), "lorenz": points (share of people, share of votes), the least
        active first.
    """
    counts = np.sort(np.array(list(Counter(v["annotator"] for v in votes).values()), dtype=np.float64))
    size = len(counts)
    if not size:
        return {"annotators": 0, "most": 0, "median": 0.0, "gini": 0.0, "lorenz": [[0.0, 0.0], [1.0, 1.0]]}
    cumulated = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    people = np.linspace(0, 1, size + 1)
    gini = 1 - float(((cumulated[1:] + cumulated[:-1]) / size).sum())
    shown = np.unique(np.linspace(0, size, min(size, 100) + 1).round().astype(int))
    lorenz = [[float(people[i]), float(cumulated[i])] for i in shown]
    return {
        "annotators": size,
        "most": int(counts[-1]),
        "median": float(np.median(counts)),
        "gini": max(0.0, gini),
        "lorenz": lorenz,
    }


def pace(votes: Sequence[Vote]) -> dict[str, float] | None:
    """Seconds of a vote: "median", "p5", "p25", "p75", "p95", and "zoomed", the share with the pair enlarged; None: unknown."""
    seconds = np.array([float(v["rt_ms"]) for v in votes if v["rt_ms"] is not None]) / 1000
    if not len(seconds):
        return None
    cuts = dict(zip(("p5", "p25", "median", "p75", "p95"), np.percentile(seconds, [5, 25, 50, 75, 95]), strict=True))
    return {name: float(cut) for name, cut in cuts.items()} | {"zoomed": float(np.mean([bool(v["zoomed"]) for v in votes]))}


def _share(right: Sequence[bool], of: Sequence[Vote]) -> dict[str, Any] | None:
    if not of:
        return None
    people, prompts = (numbered([v[key] for v in of]) for key in ("annotator", "prompt"))
    found = ratings.share(np.array(right, dtype=np.float64), prompts, people)
    return {"share": found.share, "lo": found.lo, "hi": found.hi, "votes": found.votes}


def _chose_left(vote: Vote) -> bool:
    return (vote["choice"] == "a") == bool(vote["left_is_a"])


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
