"""Does a model still draw all that a prompt leaves open? Reverse-KL distillation likes to forget some of it.

Only strictly right images count, and each is compared with the true scene of the same prompt and seed, so an arm and
its truth always have equally many objects and a ratio of 1 means "as varied as the truth" at every sample size.
Two measures (ours), for each attribute that a prompt leaves open (colour, size, cell of nine):

entropy: of the attribute over all prompts of a task, in bits. Falls when a model forgets values altogether.
seed_pairs: probability that two seeds of the same prompt differ. Falls when each prompt gets its one picture,
    although different prompts may still look different.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate import statistics
from fewstep.evaluate.outcomes import Outcome, tasks, verdicts
from fewstep.evaluate.protocol import swapped
from fewstep.worlds.shapes.grammar import Ask, parse
from fewstep.worlds.shapes.prompts import Prompt
from fewstep.worlds.shapes.scene import COLORS, SIZES

Float = NDArray[np.float64]
Measured = Callable[[Float, Float], Float]

VALUES: dict[str, tuple[object, ...]] = {"color": COLORS, "size": SIZES, "cell": tuple(range(9))}
FIELD = {"color": 1, "size": 2, "cell": 3}  # position in a stored fact
MEASURES = ("entropy", "seed_pairs")
FEWEST = 20  # images; below this a task says nothing about variety
DRAWS = 1_000


class Diversity(NamedTuple):
    """One measure of one attribute: the arm over the truth, with its interval; None where too little is right."""

    attribute: str
    measure: str
    ratio: float | None
    lo: float | None
    hi: float | None
    n_images: int


def diversity(outcome: Outcome, ceiling: Outcome, draws: int = DRAWS, seed: int = 0) -> list[Diversity]:
    """Every measure of every attribute for one arm.

    Args:
        outcome: the arm.
        ceiling: the autoencoder's outcome on the same protocol, which holds the true scenes.
        draws: bootstrap draws over prompts.
        seed: of the draws.

    Raises:
        ValueError: the protocols differ, or `ceiling` holds no true scenes.
    """
    if outcome["protocol"] != ceiling["protocol"]:
        raise ValueError(f"{outcome['name']} and {ceiling['name']} were made with different protocols")
    if any("truth" not in r for r in ceiling["results"]):
        raise ValueError(f"{ceiling['name']} holds no true scenes: it must be the autoencoder's arm")
    return [_measure(outcome, ceiling, a, m, draws, seed) for a in VALUES for m in MEASURES]


def role_swap_joint(outcome: Outcome, scoring: str = "strict") -> tuple[statistics.Estimate, int] | None:
    """Share of (pair, seed) in which "A left of B" and "B left of A" are both right, its interval, and pairs.

    A model that reads a prompt as a bag of words cannot exceed a quarter. None without pairs in the protocol.
    """
    right = verdicts(outcome, scoring)
    texts = [r["text"] for r in outcome["results"] if r["seed"] == 0]
    position = {text: i for i, text in enumerate(texts)}
    pairs: list[tuple[int, int]] = []
    for i, (text, task) in enumerate(zip(texts, tasks(outcome), strict=True)):
        partner = (
            position.get(swapped(Prompt(text, parse(text), "role_swap")).text, -1)
            if task == "role_swap"
            else -1
        )
        if partner > i:
            pairs.append((i, partner))
    if not pairs:
        return None
    both, names = np.array([right[i] & right[j] for i, j in pairs]), ["pairs"] * len(pairs)
    return statistics.with_bounds(statistics.bootstrap(both, names), both, names, 0, 1)["pairs"], len(pairs)


def is_open(ask: Ask, attribute: str) -> bool:
    """Whether a prompt leaves an attribute of its objects to the model. Where things stand is never said in full."""
    if attribute == "cell":
        return True
    if attribute == "size" and ask.relation == "larger than":
        return False
    return all(getattr(thing, attribute) is None for thing in ask.things)


def entropy(counts: Float) -> Float:
    """Shannon entropy in bits of histograms (..., K), 0 for an empty one."""
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-12)
    out: Float = -(share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return out


def seed_pairs(histograms: Float) -> tuple[float, float]:
    """Sum over pairs of images of the probability that their attribute differs, and how many pairs there are.

    Args:
        histograms: (images of one prompt, K), rows sum to 1. Unbiased for any number of images from 2.
    """
    n = len(histograms)
    total = histograms.sum(axis=0)
    agree = (float(total @ total) - float((histograms**2).sum())) / 2
    pairs = n * (n - 1) / 2
    return pairs - agree, pairs


def _measure(
    outcome: Outcome, ceiling: Outcome, attribute: str, measure: str, draws: int, seed: int
) -> Diversity:
    """Ratio of the weighted sums over tasks; prompts are resampled within tasks, alike for arm and truth."""
    top, bottom, images = np.zeros(1 + draws), np.zeros(1 + draws), 0
    for stream, rows in enumerate(_by_task(outcome, ceiling, attribute)):
        used = sum(len(arm) for arm, _ in rows)
        if used < FEWEST:
            continue
        images += used
        weights = np.vstack([np.ones(len(rows)), statistics.resampling(len(rows), draws, seed, stream)])
        for side, total in ((0, top), (1, bottom)):
            histograms = [row[side] for row in rows]
            total += _entropies(histograms, weights) if measure == "entropy" else _pairs(histograms, weights)
    if not images or not bottom.all():
        return Diversity(attribute, measure, None, None, None, images)
    ratios = top / bottom
    return Diversity(attribute, measure, float(ratios[0]), *statistics.percentiles(ratios[1:]), images)


def _entropies(histograms: Sequence[Float], weights: Float) -> Float:
    """Entropy of each draw, times its images, so that tasks count by what they hold."""
    pooled: Float = weights @ np.stack([h.sum(axis=0) for h in histograms])
    out: Float = entropy(pooled) * pooled.sum(axis=-1)
    return out


def _pairs(histograms: Sequence[Float], weights: Float) -> Float:
    """Differing pairs of each draw; arm and truth have the same pairs, so their number cancels in the ratio."""
    differing = np.array([seed_pairs(h / h.sum(axis=1, keepdims=True))[0] for h in histograms])
    out: Float = weights @ differing
    return out


def _by_task(outcome: Outcome, ceiling: Outcome, attribute: str) -> list[list[tuple[Float, Float]]]:
    """For each task, for each prompt with something right: counts (right images, K) of the arm and of the truth."""
    grouped: dict[str, dict[int, list[tuple[Float, Float]]]] = {}
    for result, truth in zip(outcome["results"], ceiling["results"], strict=True):
        if result["strict"] and is_open(parse(result["text"]), attribute):
            pair = (_counts(result["facts"], attribute), _counts(truth["truth"], attribute))
            grouped.setdefault(result["task"], {}).setdefault(result["prompt"], []).append(pair)
    return [
        [(np.stack([a for a, _ in images]), np.stack([t for _, t in images])) for images in prompts.values()]
        for prompts in grouped.values()
    ]


def _counts(facts: Sequence[Sequence[object]], attribute: str) -> Float:
    shown = [fact[FIELD[attribute]] for fact in facts]
    return np.array([shown.count(value) for value in VALUES[attribute]], dtype=np.float64)
