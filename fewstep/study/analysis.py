"""All figures of a study: votes in, a JSON-ready record out, and its verdict in sentences.

Ratings and shares use normal votes alone: gold pairs and repeats judge the people. Rules of exclusion are written before votes
come in, are applied once, and everything is shown with and without them. That somebody disagrees with the others is no reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

import numpy as np

from fewstep.evaluate.planning import holm
from fewstep.study import agreement, planning, ratings, secondary
from fewstep.study.agreement import Vote
from fewstep.study.ratings import LEVEL, Table

FORMAT = 1
QUESTIONS = {"quality": "in quality", "adherence": "in following the prompt"}
FEW = 300  # votes of a pair below which a verdict is called preliminary
AIMS = (0.6, 0.55, 0.53, 0.52, 0.51)  # shares that a sentence may say more votes would show


@dataclass(frozen=True)
class Rules:
    """Whose votes are left out; 0 switches a rule off.

    Attributes:
        min_gold_accuracy: share of gold pairs answered rightly, 0 to 1.
        min_gold: gold pairs that somebody must have seen to be judged by them.
        min_median_ms: median time of a vote in milliseconds.
        min_votes: votes of all kinds; whoever answered all that they were given has enough.
    """

    min_gold_accuracy: float = 0.0
    min_gold: int = 4
    min_median_ms: float = 0.0
    min_votes: int = 0


def rules(protocol: Mapping[str, Any]) -> Rules:
    """Rules that a study's protocol wrote down under "exclusion"; none where it says nothing.

    Raises:
        ValueError: an unknown rule, or a value that is no number or out of range; names it.
    """
    told = protocol.get("exclusion") or {}
    if not isinstance(told, Mapping):
        raise ValueError("exclusion must be rules by name")
    known = {f.name for f in fields(Rules)}
    for name, value in told.items():
        if name not in known:
            raise ValueError(f"exclusion.{name} is no rule: there are {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"exclusion.{name} must be a number, 0 or more, not {value!r}")
    made = Rules(**told)
    if made.min_gold_accuracy > 1:
        raise ValueError(f"exclusion.min_gold_accuracy is a share, 0 to 1, not {made.min_gold_accuracy}")
    return made


def excluded(votes: Sequence[Vote], chosen: Rules, finished: Collection[str] = ()) -> list[dict[str, Any]]:
    """Annotators whom the rules leave out: "annotator", "votes", "why".

    Args:
        votes: as `study.store.votes` gives them.
        chosen: the rules.
        finished: annotators who answered all that they were given, however little that was.
    """
    people: dict[str, list[Vote]] = {}
    for v in votes:
        people.setdefault(v["annotator"], []).append(v)
    asked = agreement.gold(votes)
    out = []
    for name, own in people.items():
        why = []
        gold = asked.get(name, {"asked": 0, "right": 0})
        if gold["asked"] >= max(1, chosen.min_gold) and gold["right"] < chosen.min_gold_accuracy * gold["asked"]:
            why.append(f"{gold['right']} of {gold['asked']} gold pairs right, {100 * chosen.min_gold_accuracy:g} % needed")
        times = [v["rt_ms"] for v in own if v["rt_ms"] is not None]
        if times and median(times) < chosen.min_median_ms:
            why.append(f"median {median(times) / 1000:.2f} s a vote, {chosen.min_median_ms / 1000:g} s needed")
        if len(own) < chosen.min_votes and name not in finished:
            why.append(f"{len(own)} votes, {chosen.min_votes} needed")
        if why:
            out.append({"annotator": name, "votes": len(own), "why": "; ".join(why)})
    return out


def choose_anchor(arms: Sequence[str], anchor: str | None = None) -> str:
    """The arm that has 1000: the one asked for, else the first whose name says teacher, else the first.

    Raises:
        ValueError: no arms, or an anchor that is none of them.
    """
    if not arms:
        raise ValueError("the study has no arms")
    if anchor is not None and anchor not in arms:
        raise ValueError(f"the anchor {anchor!r} is no arm of this study: {', '.join(arms)}")
    return anchor or next((a for a in arms if "teacher" in a.lower()), arms[0])


def analyse(
    votes: Sequence[Vote],
    arms: Sequence[str] | None = None,
    anchor: str | None = None,
    chosen: Rules = Rules(),  # noqa: B008 - frozen
    level: float = LEVEL,
    finished: Collection[str] = (),
) -> dict[str, Any]:
    """Everything that a report says.

    Args:
        votes: as `study.store.votes` gives them.
        arms: names, in order; by default those in the votes.
        anchor: see `choose_anchor`.
        chosen: rules of exclusion, see `rules`.
        level: of the intervals.
        finished: see `excluded`.

    Returns:
        "format", "level", "anchor", "arms", "rules", "excluded", "ratings" (one list over all questions: "arm", "question",
        "rating", "lo", "hi", "votes", "note"; what is not known is None), "questions" (see `question`), "verdicts" ({"text",
        "more"} for each question's pairs with the anchor), "others" (the same for other pairs), "sentences" (verdicts' texts).

    Raises:
        ValueError: no arms, an unknown anchor, or a malformed vote.
    """
    found = sorted({v[k] for v in votes for k in ("arm_a", "arm_b")})
    names = list(arms) if arms is not None else found
    base = choose_anchor(names, anchor)
    out = excluded(votes, chosen, finished)
    gone = {e["annotator"] for e in out}
    asked = [q for q in QUESTIONS if any(v["question"] == q for v in votes)]
    asked += sorted({v["question"] for v in votes} - set(asked))
    parts = {q: question([v for v in votes if v["question"] == q], q, names, base, gone, level) for q in asked}
    verdicts = [s for part in parts.values() for s in part["verdicts"]] or [{"text": "There are no votes yet.", "more": ""}]
    return {
        "format": FORMAT,
        "level": level,
        "anchor": base,
        "arms": names,
        "rules": asdict(chosen),
        "excluded": out,
        "ratings": [{**r, "question": q} for q, part in parts.items() for r in part["ratings"]],
        "questions": parts,
        "verdicts": verdicts,
        "others": [s for part in parts.values() for s in part["others"]],
        "sentences": [f"{v['text']} {v['more']}".strip() for v in verdicts],
    }


def question(
    votes: Sequence[Vote], name: str, arms: Sequence[str], anchor: str, gone: set[str], level: float = LEVEL
) -> dict[str, Any]:
    """One question's figures.

    Args:
        votes: on it.
        name: of the question.
        arms, anchor: names.
        gone: annotators who are left out.
        level: of the intervals.

    Returns:
        "votes" (that count), "left_out", "prompts", "annotators", "ratings", "pairs", "before" ("ratings" and "pairs" with
        nobody left out; None where nobody is), "side", "davidson", "answers" (how often each), "agreement", "gold",
        "gold_each" (of everybody), "repeats", "categories", "without_each", "loads", "pace", "notes", "verdicts", "others".
    """
    kept = [v for v in votes if v["annotator"] not in gone]
    normal = [v for v in kept if v["kind"] == "normal"]
    everybody = [v for v in votes if v["kind"] == "normal"]
    table = ratings.table(normal, arms)
    main, notes = core(table, anchor, level)
    people, tested = list(dict.fromkeys(v["annotator"] for v in normal)), len(main["pairs"])
    before = core(ratings.table(everybody, arms), anchor, level)[0] if len(everybody) > len(normal) else None
    gone_here = {v["annotator"] for v in everybody} & gone if not normal else set()
    with_anchor = [p for p in main["pairs"] if anchor in (p["a"], p["b"])]
    side, tied = secondary.side(table, anchor, level), secondary.davidson(table, anchor, level)
    return {
        "votes": len(normal),
        "left_out": len(everybody) - len(normal),
        "prompts": len({v["prompt"] for v in normal}),
        "annotators": len(people),
        **main,
        "before": before,
        "side": side._asdict() if side is not None else None,
        "davidson": _davidson(tied, arms),
        "answers": {c: sum(v["choice"] == c for v in normal) for c in ratings.CHOICES},
        "agreement": agreement.agree(normal),
        "gold": agreement.gold_share(kept),
        "gold_each": [{"annotator": who, **found} for who, found in agreement.gold(votes).items()],
        "repeats": agreement.repeats(kept),
        "categories": categories(normal, arms, anchor, level),
        "without_each": secondary.without_each(table, anchor, people),
        "loads": agreement.loads(normal),
        "pace": agreement.pace(normal),
        "notes": notes,
        "verdicts": verdicts(with_anchor, main["ratings"], name, tested, gone_here),
        "others": [verdict(p, name, tested) for p in main["pairs"] if anchor not in (p["a"], p["b"])],
    }


def core(table: Table, anchor: str, level: float = LEVEL) -> tuple[dict[str, Any], list[str]]:
    """Ratings and pairs of one question, and what limits them, in words.

    Returns:
        {"ratings": best first, those without a number last; "pairs": those with the anchor first}. A pair has "a", "b", "share"
        (of the votes, for a, ties half), "lo", "hi", "votes", "p", "holm" (p adjusted for all pairs of the question),
        "design_effect" (None: unknown), "ties", "both_bad" (shares), "note".
    """
    found, covariance = ratings.bradley_terry(table, anchor, level)
    listed = [r._asdict() for r in sorted(found, key=lambda r: -math.inf if r.rating is None else r.rating, reverse=True)]
    order = {r["arm"]: i for i, r in enumerate(listed)}
    pairs = []
    for i, a in enumerate(table.arms):
        for b in table.arms[i + 1 :]:
            one, other = (a, b) if b == anchor or (a != anchor and order[a] < order[b]) else (b, a)
            share = ratings.between(table, one, other, level)
            if share is None:
                continue
            own = _of(table, one, other)
            pairs.append({"a": one, "b": other, **share._asdict(), "ties": float(own.tied.mean()),
                          "both_bad": float(own.bad.mean())})  # fmt: skip
    for pair, adjusted in zip(pairs, holm([p["p"] for p in pairs]) if pairs else [], strict=True):
        pair["holm"] = adjusted
    pairs.sort(key=lambda p: (p["b"] != anchor, order[p["a"]], order[p["b"]]))
    notes = [f"{r.arm} has no rating: {r.note}." for r in found if r.note]
    if covariance is not None and covariance.note:
        notes.append(f"{covariance.note[0].upper()}{covariance.note[1:]}.")
    if covariance is not None and covariance.freedom < 10 and not covariance.note:
        notes.append(f"With {covariance.freedom + 1} prompts or annotators, intervals are rough: give the study more of them.")
    return {"ratings": listed, "pairs": pairs}, notes


def categories(votes: Sequence[Vote], arms: Sequence[str], anchor: str, level: float = LEVEL) -> list[dict[str, Any]]:
    """Share of each arm against the anchor, by category of the prompt: "category", "arm", "share", "lo", "hi", "votes"."""
    out = []
    for category in dict.fromkeys(sorted(v["category"] for v in votes)):
        table = ratings.table([v for v in votes if v["category"] == category], arms)
        for arm in arms:
            share = ratings.between(table, arm, anchor, level) if arm != anchor else None
            if share is not None:
                found = {key: getattr(share, key) for key in ("share", "lo", "hi", "votes", "note")}
                out.append({"category": category, "arm": arm, **found})
    return out


def verdicts(
    pairs: Sequence[Mapping[str, Any]],
    listed: Sequence[Mapping[str, Any]],
    name: str,
    tested: int,
    gone: Collection[str] = (),
) -> list[dict[str, str]]:
    """What the votes say of pairs, then what keeps an arm from a rating; each with "text" and "more".

    `gone` are the people of a question of which no vote counts, because the rules left all of them out.
    """
    where = QUESTIONS.get(name, "in " + name)
    out = [verdict(p, name, tested) for p in pairs]
    if not pairs and gone:
        who = f"all {len(gone)} people were" if len(gone) > 1 else "the only person was"
        return [{"text": f"No vote counts {where}: {who} left out by the rules of the protocol.", "more": ""}]
    if not pairs:
        out = [{"text": f"Nobody has compared another arm with the anchor {where} yet.", "more": ""}]
    return out + [{"text": f"{r['arm']} has no rating {where}: {r['note']}.", "more": ""} for r in listed if r["note"]]


def verdict(pair: Mapping[str, Any], name: str, tested: int) -> dict[str, str]:
    """One of `tested` pairs: told apart or not at 5 % after Holm's correction ("text"), what more votes would show ("more")."""
    where, early = QUESTIONS.get(name, "in " + name), "Preliminary: " if pair["votes"] < FEW else ""
    same = pair["holm"] >= 1 - LEVEL
    turn = not same and pair["share"] < 0.5
    first, second = (pair["b"], pair["a"]) if turn else (pair["a"], pair["b"])
    mean, lo, hi = (1 - pair[k] if turn else pair[k] for k in (("share", "hi", "lo") if turn else ("share", "lo", "hi")))
    votes = f"{pair['votes']:,} {'vote' if pair['votes'] == 1 else 'votes'}"
    told = f"{100 * mean:.0f} % ({100 * lo:.0f} to {100 * hi:.0f}) of {votes}"
    if not same:
        return {"text": f"{early}{first} is preferred to {second} {where}: {told}, ties counted half.", "more": ""}
    text = f"{early}{first} and {second} cannot be told apart {where}: {told} for {first}, ties counted half."
    surprise = "The interval alone leaves 50 % out, but among so many pairs that is no surprise (Holm). "
    return {"text": text, "more": (("" if lo <= 0.5 <= hi else surprise) + more(pair, tested)).strip()}


def more(pair: Mapping[str, Any], tested: int) -> str:
    """How many more votes would show a smaller difference by the test of the verdict: as one of `tested` pairs.

    Empty where likeness of votes is unknown.
    """
    if pair["design_effect"] is None:
        return ""
    effect, ties = max(1.0, pair["design_effect"]), min(0.99, pair["ties"])
    seen = planning.detectable(pair["votes"] / effect, ties=ties, comparisons=tested)
    for aim in AIMS:
        needed = math.ceil(planning.votes_needed(aim, ties=ties, comparisons=tested) * effect) - pair["votes"]
        if needed > 0:
            shown = f"So many votes show a share of {100 * seen:.0f} % or more; about" if seen < 0.95 else "About"
            return f"{shown} {needed:,} more would be needed to see {100 * aim:.0f} %."
    return ""


def _of(table: Table, one: str, other: str) -> Table:
    i, j = table.arms.index(one), table.arms.index(other)
    return table.part(((table.first == i) & (table.second == j)) | ((table.first == j) & (table.second == i)))


def _davidson(found: secondary.Davidson | None, arms: Sequence[str]) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = []
    for arm, value, half in zip(arms, found.ratings, found.half, strict=True):
        known = bool(np.isfinite(value))
        ends = [float(value - half), float(value + half)] if known and half > 0 else [None, None]
        rows.append({"arm": arm, "rating": float(value) if known else None, "lo": ends[0], "hi": ends[1]})
    return {"ratings": rows, "ties": found.ties}


def people(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """By annotator, the busiest first: "annotator", "votes" (of all kinds), "gold" ("asked", "right"; or None), "seconds"."""
    gold, counts = agreement.gold(votes), Counter(v["annotator"] for v in votes)
    times: dict[str, list[float]] = {}
    for v in votes:
        if v["rt_ms"] is not None:
            times.setdefault(v["annotator"], []).append(v["rt_ms"] / 1000)
    return [
        {"annotator": who, "votes": n, "gold": gold.get(who), "seconds": median(times[who]) if who in times else None}
        for who, n in counts.most_common()
    ]
