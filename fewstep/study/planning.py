"""How many votes a study needs, what they cost, and how wide its intervals will be.

Votes on one prompt resemble each other, and so do votes of one person. A design effect says how many votes are worth one
independent vote; it is guessed (1.5 to 2.5 is usual) or estimated from the votes of a pilot by analysis of variance.
Formulas: of the normal approximation to a share, and Kish's design effect; with two clusterings, ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

ELO = 400 / math.log(10)  # Elo points of one logit
POWER, LEVEL = 0.8, 0.05
DESIGN_EFFECT = 2.0  # without a pilot


class Likeness(NamedTuple):
    """How alike votes on the same two arms are.

    Attributes:
        prompt: intra-class correlation of votes on one prompt, 0 to 1; nan where no prompt has two.
        annotator: of votes of one person.
        per_prompt: votes that share a vote's prompt and arms, itself counted; the mean over votes.
        per_annotator: votes that share a vote's annotator and arms, itself counted.
    """

    prompt: float
    annotator: float
    per_prompt: float
    per_annotator: float


class Sizes(NamedTuple):
    """How many votes of a planned study share a vote's arms and its prompt or its annotator, itself counted; means."""

    per_prompt: float
    per_annotator: float


def votes_needed(
    win_rate: float, power: float = POWER, level: float = LEVEL, ties: float = 0.0, comparisons: int = 1
) -> int:
    """Independent votes of one pair that show a win rate to differ from a half.

    Args:
        win_rate: share of votes for one arm, ties counted half; not 0.5.
        power: chance of seeing the difference if it is there.
        level: two-sided, chance of seeing one that is not there.
        ties: share of votes that are ties or "both bad"; they count half, so the votes scatter less.
        comparisons: pairs that are tested together; the level is divided by it.

    Raises:
        ValueError: a share outside its range, or a win rate of a half.
    """
    _check(win_rate=win_rate, power=power, level=level)
    if not 0 <= ties < 1 or comparisons < 1:
        raise ValueError(f"ties must be 0 to below 1 and comparisons 1 or more, not {ties} and {comparisons}")
    if abs(win_rate - 0.5) < 1e-9:
        raise ValueError("a win rate of 0.5 is no difference: give one to be seen, such as 0.55")
    z = _z(1 - level / comparisons / 2) + _z(power)
    return math.ceil(z**2 * 0.25 * (1 - ties) / (win_rate - 0.5) ** 2 - 1e-9)


def detectable(
    votes: float, power: float = POWER, level: float = LEVEL, ties: float = 0.0, comparisons: int = 1
) -> float:
    """Smallest win rate above a half that so many independent votes can show; 1 or more means none.

    Arguments as in `votes_needed`, whose inverse it is.

    Raises:
        ValueError: no votes, or no comparison.
    """
    _check(power=power, level=level)
    if votes <= 0 or comparisons < 1:
        raise ValueError(f"votes must be above 0 and comparisons 1 or more, not {votes} and {comparisons}")
    return 0.5 + (_z(1 - level / comparisons / 2) + _z(power)) * math.sqrt(0.25 * (1 - ties) / votes)


def half_width(votes: float, arms: int, level: float = LEVEL, ties: float = 0.0) -> float:
    """Expected half width, in Elo points, of the interval of an arm's rating against the anchor's.

    Args:
        votes: independent votes of each pair.
        arms: compared, every pair equally often; near each other in strength.
        level: 0.05 for 95 %.
        ties: share of ties.
    """
    if votes <= 0 or arms < 2:
        raise ValueError(f"votes must be above 0 and arms 2 or more, not {votes} and {arms}")
    # Fisher's information of a complete graph: each pair adds votes / 4; two arms differ with variance 8 / (arms votes).
    return _z(1 - level / 2) * math.sqrt(8 * (1 - ties) / (arms * votes)) * ELO


def design_effect(prompt: float, annotator: float, per_prompt: float, per_annotator: float) -> float:
    """Votes worth one independent vote, from likeness (intra-class correlations) and how many votes share a cluster.

    Raises:
        ValueError: a correlation outside 0 to 1, or fewer than one vote in a cluster.
    """
    if not (0 <= prompt <= 1 and 0 <= annotator <= 1):
        raise ValueError(f"correlations must be 0 to 1, not {prompt} and {annotator}")
    if per_prompt < 1 or per_annotator < 1:
        raise ValueError(f"a cluster has at least one vote, not {per_prompt} and {per_annotator}")
    return 1 + (per_prompt - 1) * prompt + (per_annotator - 1) * annotator


def likeness(votes: Sequence[Mapping[str, Any]]) -> Likeness:
    """Likeness of a pilot's votes on one question, by one-way analysis of variance for prompts and for annotators.

    Args:
        votes: of one question, as the store gives them; gold and repeated ones are left out.

    Raises:
        ValueError: fewer than two votes, or no two votes share a prompt and none an annotator: a pilot of single votes
            says nothing about likeness.
    """
    kept = [v for v in votes if v["kind"] == "normal"]
    if len(kept) < 2:
        raise ValueError(f"a design effect needs a pilot's votes, found {len(kept)}: give one, such as 2")
    flip = [v["arm_a"] > v["arm_b"] for v in kept]
    score = np.array([{"a": 1.0, "b": 0.0}.get(v["choice"], 0.5) for v in kept])
    score = np.where(flip, 1 - score, score)
    pair = numbered([tuple(sorted((v["arm_a"], v["arm_b"]))) for v in kept])
    score = score - (np.bincount(pair, score) / np.bincount(pair))[pair]
    prompt = numbered([(int(p), v["prompt"]) for p, v in zip(pair, kept, strict=True)])
    annotator = numbered([(int(p), v["annotator"]) for p, v in zip(pair, kept, strict=True)])
    if prompt.max() + 1 == len(kept) and annotator.max() + 1 == len(kept):
        raise ValueError("no two of the pilot's votes share a prompt or an annotator: give a design effect, such as 2")
    return Likeness(
        intraclass(score, prompt), intraclass(score, annotator), cluster_size(prompt), cluster_size(annotator)
    )


def pilot(votes: Sequence[Mapping[str, Any]]) -> dict[str, Likeness]:
    """Likeness of a pilot's votes, by question.

    Only the correlations are those of a larger study: how many votes share a prompt or a person there is its plan's matter.

    Raises:
        ValueError: no votes, or single ones on every prompt or of every annotator, which do not say how alike two would be.
    """
    asked = sorted({v["question"] for v in votes if v["kind"] == "normal"})
    if not asked:
        raise ValueError("the pilot holds no votes that count: give --design-effect, such as 2")
    found = {q: likeness([v for v in votes if v["question"] == q]) for q in asked}
    for question, alike in found.items():
        for what in ("prompt", "annotator"):
            if math.isnan(getattr(alike, what)):
                raise ValueError(
                    f"the pilot's votes on {question} do not tell how alike votes of one {what} are: no {what} has two on the "
                    f"same arms, or there is one {what}. Give a pilot that has them, or --design-effect, such as 2"
                )
    return found


def sizes_of(design: Mapping[str, Any]) -> Sizes:
    """Of a made study, from the design in its protocol."""
    each = max(design["slots"].values()) / design["contests"]
    return Sizes(max(1.0, each / design["prompts"]), max(1.0, each / design["annotators"]))


def sizes_for(
    arms: int, checks: float = 0.1, overlap: float = 0.15, seeds: int = 4, questions: int = 2, votes_per_annotator: int = 160
) -> Sizes:
    """Of a study that `describe` plans; arguments as there."""
    pairs = max(1, arms * (arms - 1) // 2)
    own = votes_per_annotator * (1 - checks) / questions / pairs
    return Sizes(max(1.0, seeds * (1 + 2 * overlap)), max(1.0, own))


def intraclass(values: ArrayLike, cluster: NDArray[np.int64]) -> float:
    """Intra-class correlation by one-way analysis of variance, held to 0 to 1; nan for one cluster, or none with two members.

    `evaluate.planning.intra_prompt_correlation` is the same for clusters of one size, which votes do not have.

    Args:
        values: (N,).
        cluster: (N,) numbers of clusters, 0 and up without gaps.
    """
    y = np.asarray(values, dtype=np.float64)
    sizes = np.bincount(cluster).astype(np.float64)
    groups, count = len(sizes), len(y)
    if groups < 2 or groups == count:
        return math.nan
    means = np.bincount(cluster, y) / sizes
    between = float((sizes * (means - y.mean()) ** 2).sum()) / (groups - 1)
    within = float(((y - means[cluster]) ** 2).sum()) / (count - groups)
    usual = (count - (sizes**2).sum() / count) / (groups - 1)
    total = between + (usual - 1) * within
    return min(1.0, max(0.0, (between - within) / total)) if total > 0 else 0.0


def cluster_size(cluster: NDArray[np.int64]) -> float:
    """How many members the cluster of a random member has, itself counted."""
    sizes = np.bincount(cluster).astype(np.float64)
    return float((sizes**2).sum() / sizes.sum())


def describe(
    arms: int,
    win_rate: float = 0.55,
    design_effect: float = DESIGN_EFFECT,
    seconds_per_vote: float = 8.0,
    pay_per_hour: float = 12.0,
    votes_per_annotator: int = 160,
    *,
    seeds: int = 4,
    questions: int = 2,
    checks: float = 0.1,
    ties: float = 0.0,
    overlap: float = 0.15,
    power: float = POWER,
    level: float = LEVEL,
    comparisons: int | None = None,
) -> dict[str, Any]:
    """A study's size and cost.

    Args:
        arms: compared, every one with every other.
        win_rate: smallest that is to be seen, ties counted half.
        design_effect: votes worth one independent vote.
        seconds_per_vote: of an annotator's time.
        pay_per_hour: in any currency.
        votes_per_annotator: of all kinds and questions.
        seeds: images of each prompt and arm.
        questions: asked of each pair of images.
        checks: share of all votes that are gold or repeated: they are paid and do not count.
        ties: expected share of ties.
        overlap: share of items that get three votes, so that agreement can be measured.
        power: chance of seeing the difference.
        level: two-sided.
        comparisons: pairs that are tested together; by default all, as a report does it (Holm's correction begins there).

    Returns:
        JSON-ready: what was asked for, and "pairs", "independent_votes", "votes_per_pair", "items_per_pair" (prompts × seeds),
        "prompts", "images", "counted_votes", "votes", "annotators", "minutes_per_annotator", "hours", "cost",
        "half_width_elo", "half_width_points", "win_rates" (votes for other differences).

    Raises:
        ValueError: a number out of its range; says which.
    """
    _check(win_rate=win_rate, power=power, level=level)
    told = {"arms": arms, "seeds": seeds, "questions": questions, "votes_per_annotator": votes_per_annotator}
    for name, value in told.items():
        least = 2 if name == "arms" else 1
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    check_effort(design_effect, seconds_per_vote, pay_per_hour)
    if not 0 <= checks < 1 or not 0 <= overlap <= 1:
        raise ValueError(f"checks must be 0 to below 1 and overlap 0 to 1, not {checks} and {overlap}")
    pairs = arms * (arms - 1) // 2
    comparisons = pairs if comparisons is None else comparisons
    alone = votes_needed(win_rate, power, level, ties, comparisons)
    each = math.ceil(alone * design_effect - 1e-9)
    prompts = math.ceil(each / (1 + 2 * overlap) / seeds)
    counted = each * pairs * questions
    votes = math.ceil(counted / (1 - checks) - 1e-9)
    annotators = math.ceil(votes / votes_per_annotator)
    hours = votes * seconds_per_vote / 3600
    effective = each / design_effect
    return {
        "arms": arms, "win_rate": win_rate, "design_effect": design_effect, "power": power, "level": level, "ties": ties,
        "comparisons": comparisons, "seeds": seeds, "questions": questions, "checks": checks, "overlap": overlap,
        "seconds_per_vote": seconds_per_vote, "pay_per_hour": pay_per_hour, "votes_per_annotator": votes_per_annotator,
        "pairs": pairs, "independent_votes": alone, "votes_per_pair": each, "items_per_pair": prompts * seeds,
        "prompts": prompts, "images": prompts * seeds * arms, "counted_votes": counted, "votes": votes,
        "annotators": annotators, "minutes_per_annotator": votes / annotators * seconds_per_vote / 60, "hours": hours,
        "cost": hours * pay_per_hour, "half_width_elo": half_width(effective, arms, level, ties),
        "half_width_points": 100 * _z(1 - level / 2) * math.sqrt(0.25 * (1 - ties) / effective),
        "win_rates": {
            f"{rate:g}": math.ceil(votes_needed(rate, power, level, ties, comparisons) * design_effect - 1e-9)
            for rate in (0.6, 0.55, 0.53, 0.52)
        },
    }


def show(plan: Mapping[str, Any]) -> str:
    """A plan of `describe` in words."""
    p = plan
    other = ", ".join(f"{100 * float(rate):g} %: {votes:,}" for rate, votes in p["win_rates"].items())
    tested = f", corrected for {p['comparisons']} pairs tested together" if p["comparisons"] > 1 else ""
    lines = [
        f"To see a win rate of {100 * p['win_rate']:g} % ({100 * p['power']:g} % power, level {p['level']:g}{tested}), "
        f"a pair needs {p['independent_votes']:,} independent votes.",
        f"With a design effect of {p['design_effect']:.2g}: {p['votes_per_pair']:,} votes a pair and question.",
        "",
        f"  arms                {p['arms']:>10,}   {p['pairs']} {_word('pair', p['pairs'])} of arms",
        f"  prompts × seeds     {p['prompts']:>10,} × {p['seeds']}   {p['images']:,} images in all",
        f"  votes that count    {p['counted_votes']:>10,}   {p['questions']} {_word('question', p['questions'])}; "
        f"{100 * p['overlap']:g} % of items get three",
        f"  votes in all        {p['votes']:>10,}   {100 * p['checks']:g} % are checks",
        f"  annotators          {p['annotators']:>10,}   {p['minutes_per_annotator']:.0f} minutes each",
        f"  cost                {p['cost']:>10,.0f}   {p['hours']:,.0f} hours at {p['pay_per_hour']:g} an hour, "
        f"{p['seconds_per_vote']:g} s a vote",
        f"  expected interval   {'±' + format(p['half_width_points'], '.1f'):>10}   points of a win rate; "
        f"±{p['half_width_elo']:.0f} Elo against the anchor",
        "",
        f"Votes a pair for other win rates: {other}.",
    ]
    return "\n".join(lines)


def promised(
    design: Mapping[str, Any],
    effect: float = DESIGN_EFFECT,
    seconds_per_vote: float = 8.0,
    pay_per_hour: float = 12.0,
) -> str:
    """What a made study can show, and what it costs, in words.

    Args:
        design: of the study's protocol.
        effect: design effect, votes worth one independent vote.
        seconds_per_vote: of an annotator's time.
        pay_per_hour: in any currency.

    Raises:
        ValueError: a number out of its range; says which.
    """
    check_effort(effect, seconds_per_vote, pay_per_hour)
    pairs, slots = design["contests"], design["slots"]
    each = min(slots.values()) // pairs
    seen = detectable(each / effect, comparisons=pairs)
    votes = math.ceil(sum(slots.values()) / (1 - design["gold"] - design["repeat"]) - 1e-9)
    hours = votes * seconds_per_vote / 3600
    shown = f"a win rate of {100 * seen:.1f} % or more" if seen < 0.995 else "no win rate, however large: ask more of each pair"
    together = f", corrected for {pairs} pairs" if pairs > 1 else ""
    return (
        f"{each:,} votes a pair and question show {shown} ({100 * POWER:g} % power, level {LEVEL:g}{together}, "
        f"design effect {effect:.2g}).\n"
        f"{votes:,} votes with checks take {hours:,.1f} hours at {seconds_per_vote:g} s each, {hours * pay_per_hour:,.0f} at "
        f"{pay_per_hour:g} an hour."
    )


def check_effort(effect: float, seconds_per_vote: float, pay_per_hour: float) -> None:
    """Raises ValueError, which says which, for a number out of its range."""
    if effect < 1 or not math.isfinite(effect):
        raise ValueError(f"a design effect must be 1 or more, not {effect}")
    if not (0 < seconds_per_vote < math.inf and 0 <= pay_per_hour < math.inf):
        told = f"{seconds_per_vote} and {pay_per_hour}"
        raise ValueError(f"seconds_per_vote must be above 0 and pay_per_hour 0 or more, both finite, not {told}")


def _word(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def numbered(keys: Sequence[Any]) -> NDArray[np.int64]:
    """Numbers of equal keys, 0 and up, in order of appearance, (N,)."""
    known = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([known[key] for key in keys], dtype=np.int64)


def _z(quantile: float) -> float:
    return NormalDist().inv_cdf(quantile)


def _check(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")
