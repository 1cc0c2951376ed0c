"""Votes of a study that never took place: to try a plan or a report, and to see whether intervals hold what they claim.

In logits, arm a of a pair beats arm b with strength(a) - strength(b), plus normal effects: of each arm on each prompt, of each
image, of each annotator's taste for each arm, and of the left side. The world is ours; its default effects are the ones that
the coverage figures of docs/study.md were measured with.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from fewstep.study import ratings
from fewstep.study.design import Given, handed_out
from fewstep.study.planning import ELO
from fewstep.study.ratings import Floats, Ints, Table

CATEGORIES = ("people", "places", "things", "lettering")
BEGUN = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)


class Effects(NamedTuple):
    """Standard deviations in logits, and two constants.

    Attributes:
        prompt: of an arm on a prompt.
        image: of one image.
        annotator: of a person's taste for an arm.
        side: logits that the left image gains.
        ties: share of votes that are ties; a quarter of them are "both bad".
    """

    prompt: float = 0.6
    image: float = 0.5
    annotator: float = 0.3
    side: float = 0.0
    ties: float = 0.0


class Design(NamedTuple):
    """Who judges what: a `Table` without scores, and the seed of each vote's images, (N,)."""

    table: Table
    seed: Ints
    prompts: int
    seeds: int
    annotators: int


def design(arms: Sequence[str], prompts: int, seeds: int, annotators: int, seed: int = 0) -> Design:
    """One vote on each (prompt, seed, pair of arms), annotators and sides in turn over a shuffled list.

    Raises:
        ValueError: fewer than two arms, or nothing of something.
    """
    if len(arms) < 2 or min(prompts, seeds, annotators) < 1:
        told = f"{len(arms)}, {prompts}, {seeds}, {annotators}"
        raise ValueError(f"a study needs two arms, and prompts, seeds and annotators, not {told}")
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(len(arms)) for j in range(i + 1, len(arms))])
    prompt, number, pair = np.indices((prompts, seeds, len(pairs))).reshape(3, -1)
    count = len(pair)
    turn = rng.permutation(count)
    none = np.zeros(count)
    left = rng.permutation(count) % 2 == 0
    made = Table(tuple(arms), pairs[pair, 0], pairs[pair, 1], none, none > 0, none > 0, left, prompt, turn % annotators)
    return Design(made, number, prompts, seeds, annotators)


def draw(plan: Design, strengths: Floats, effects: Effects, rng: np.random.Generator) -> Table:
    """One study's votes.

    Args:
        plan: who judges what.
        strengths: (A,) in logits.
        effects: of everything else.
        rng: gives all effects and votes.
    """
    t, size = plan.table, len(plan.table.arms)
    prompt = effects.prompt * rng.standard_normal((plan.prompts, size))
    image = effects.image * rng.standard_normal((plan.prompts, plan.seeds, size))
    taste = effects.annotator * rng.standard_normal((plan.annotators, size))
    worth = strengths + (prompt[:, None] + image)
    a = worth[t.prompt, plan.seed, t.first] + taste[t.annotator, t.first]
    b = worth[t.prompt, plan.seed, t.second] + taste[t.annotator, t.second]
    won = rng.random(len(a)) < special.expit(a - b + effects.side * np.where(t.left, 1, -1))
    tied = rng.random(len(a)) < effects.ties if effects.ties else np.zeros(len(a), dtype=bool)
    bad = tied & (rng.random(len(a)) < 0.25) if effects.ties else tied
    return t._replace(score=np.where(tied, 0.5, won.astype(np.float64)), tied=tied, bad=bad)


def truth(strengths: Floats, effects: Effects) -> Floats:
    """Strengths that infinitely many votes would give, (A,), the first arm's 0: effects flatten those that were put in.

    The share of a pair's wins is the logistic's mean over a normal of the effects' variance; Bradley-Terry is fitted to
    these shares. (Sides are balanced; ties are not in it and flatten further.)
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    spread = np.sqrt(2 * (effects.prompt**2 + effects.image**2 + effects.annotator**2))
    gap = strengths[:, None] - strengths[None, :]
    sides = [special.expit(gap[..., None] + s * effects.side + spread * nodes) @ weights / weights.sum() for s in (1, -1)]
    shares = (1 - effects.ties) * np.mean(sides, axis=0) + effects.ties / 2
    np.fill_diagonal(shares, 0)
    return ratings.strengths(shares, 0)


def coverage(
    strengths: Sequence[float] = (0.0, 0.0, 0.1, 0.2, -0.2),
    prompts: int = 507,
    seeds: int = 4,
    annotators: int = 124,
    effects: Effects = Effects(),  # noqa: B008 - a tuple of numbers
    studies: int = 400,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How often 95 % intervals of ratings hold the truth, over simulated studies; prompts, images and people are new in each.

    Returns:
        "two_way" (what this project prints) and "independent" (votes taken for independent), each with "covers" (share of
        intervals, all arms but the anchor) and "half_width" (Elo, mean).
    """
    beta = np.array(strengths, dtype=np.float64)
    names = [f"arm {i}" for i in range(len(beta))]
    plan, rng, true = design(names, prompts, seeds, annotators, seed), np.random.default_rng([seed, 1]), truth(beta, effects)
    inside: dict[str, list[Any]] = {"two_way": [], "independent": []}
    widths: dict[str, list[Any]] = {"two_way": [], "independent": []}
    for _ in range(studies):
        found, covariance = ratings.bradley_terry(draw(plan, beta, effects, rng), names[0])
        if covariance is None or any(r.rating is None for r in found):
            continue  # too few votes for a rating: nothing was claimed
        missed = np.abs([float(r.rating or 0) - ratings.ANCHORED - ELO * t for r, t in zip(found[1:], true[1:], strict=True)])
        errors = {
            "two_way": covariance.quantile() * np.array([covariance.error(e) for e in np.eye(len(missed))]),
            "independent": 1.959964 * np.sqrt(np.diag(covariance.plain)),
        }
        for name, error in errors.items():
            inside[name].append(missed <= ELO * error)
            widths[name].append(ELO * error)
    return {
        name: {"covers": float(np.mean(inside[name])), "half_width": float(np.mean(widths[name]))} for name in inside
    }


def votes(
    strengths: Mapping[str, float],
    prompts: int = 100,
    seeds: int = 2,
    annotators: int = 12,
    effects: Effects = Effects(ties=0.15),  # noqa: B008
    question: str = "quality",
    seed: int = 0,
    **more: Any,
) -> list[dict[str, Any]]:
    """One question's votes on prompts that are made up; arguments as in `answers`, which has `more` of them."""
    names = list(strengths)
    cells = [(p, s, *ij) for p in range(prompts) for s in range(seeds) for ij in combinations(range(len(names)), 2)]
    pairs: list[dict[str, Any]] = [
        {"pair_id": n, "prompt": p, "seed": s, "arm_a": names[i], "arm_b": names[j], "question": None, "gold_answer": None}
        for n, (p, s, i, j) in enumerate(cells, 1)
    ]
    gold: dict[str, Any] = {"seed": 0, "arm_a": names[0], "arm_b": names[0], "question": question, "gold_answer": "a"}
    after = len(pairs) + prompts * (question == "adherence")  # each question has gold pairs of its own
    pairs += [{"pair_id": after + n, "prompt": n - 1, **gold} for n in range(1, prompts + 1)]
    told = [
        {"prompt": p, "text": f"prompt number {p}", "category": CATEGORIES[p % len(CATEGORIES)]} for p in range(prompts)
    ]
    return answers({"pairs": pairs, "prompts": told}, strengths, annotators, effects, question, seed=seed, **more)


def answers(
    record: Mapping[str, Any],
    strengths: Mapping[str, float],
    annotators: int = 12,
    effects: Effects = Effects(ties=0.15),  # noqa: B008
    question: str = "quality",
    overlap: float = 0.15,
    checks: float = 0.05,
    careless: Sequence[int] = (),
    seed: int = 0,
    start: int = 1,
) -> list[dict[str, Any]]:
    """One question's votes on the pairs of a study, as `study.store.votes` gives them.

    Args:
        record: of `study.store.study_record`; "pairs" and "prompts" are read.
        strengths: of the arms, in logits, by name.
        annotators: how many; pairs go to them in turn.
        effects: of prompts, images, people, sides and ties.
        question: "quality" or "adherence".
        overlap: share of pairs that two further people judge.
        checks: gold pairs and repeats, each this share of the votes. Gold is answered rightly in 96 of 100 cases.
        careless: numbers of annotators who click at random, and fast.
        seed: of everything.
        start: first vote_id.
    """
    rng = np.random.default_rng([seed, 2, len(question)])
    pairs = [p for p in record["pairs"] if p["gold_answer"] is None]
    golds = [p for p in record["pairs"] if p["gold_answer"] is not None and p["question"] == question]
    texts = {p["prompt"]: p for p in record["prompts"]}
    again = rng.random(len(pairs)) < overlap
    rows = np.concatenate([np.arange(len(pairs)), np.repeat(np.flatnonzero(again), 2)])
    step = np.concatenate([np.zeros(len(pairs), dtype=np.int64), np.tile([1, 2], int(again.sum()))])
    people = (rng.permutation(len(pairs))[rows] + step * max(1, annotators // 3)) % annotators
    left = (rng.permutation(len(pairs)) % 2 == 0)[rows] ^ (step % 2 == 1)
    drawn = _drawn([pairs[r] for r in rows], people, left, strengths, effects, rng)
    out: list[dict[str, Any]] = []
    for place in rng.permutation(len(rows)):
        person = int(people[place])
        voter = {"annotator": f"p{person:03d}", "question": question, "lazy": person in careless}
        choice = drawn[place]
        shown = {**_shown(pairs[rows[place]], texts), "left_is_a": bool(left[place])}
        given = _record(out, voter, {**shown, "choice": choice}, rng, start)
        if rng.random() < checks:
            twice = {"kind": "repeat", "repeat_of": given["vote_id"], "left_is_a": not shown["left_is_a"]}
            _record(out, voter, {**shown, **twice, "choice": _again(choice, rng)}, rng, start)
        if golds and rng.random() < checks:
            right = _shown(golds[int(rng.integers(len(golds)))], texts)
            answer = _known(right["gold_answer"], rng)
            _record(out, voter, {**right, "left_is_a": bool(rng.random() < 0.5), "choice": answer}, rng, start)
    return out


def replay(
    record: Mapping[str, Any],
    given: Sequence[Given],
    strengths: Mapping[str, float],
    effects: Effects = Effects(ties=0.15),  # noqa: B008
    question: str = "quality",
    careless: Sequence[int] = (),
    seed: int = 0,
    start: int = 1,
) -> list[dict[str, Any]]:
    """One question's votes on what people are given (`design.handed_out`); the other arguments as in `answers`."""
    rng = np.random.default_rng([seed, 2, len(question)])
    pairs, texts = {p["pair_id"]: p for p in record["pairs"]}, {p["prompt"]: p for p in record["prompts"]}
    counted = [g for g in given if g.kind == "normal"]
    people, left = (np.array([getattr(g, key) for g in counted]) for key in ("person", "left_is_a"))
    drawn = iter(_drawn([pairs[g.pair] for g in counted], people, left, strengths, effects, rng))
    out: list[dict[str, Any]] = []
    for one in given:
        shown = {**_shown(pairs[one.pair], texts), "kind": one.kind, "left_is_a": one.left_is_a}
        if one.repeat_of is not None:
            first = out[one.repeat_of]
            shown |= {"repeat_of": first["vote_id"], "choice": _again(first["choice"], rng)}
        else:
            shown["choice"] = next(drawn) if one.kind == "normal" else _known(shown["gold_answer"], rng)
        voter = {"annotator": f"p{one.person:03d}", "question": question, "lazy": one.person in careless}
        _record(out, voter, shown, rng, start)
    return out


def rehearse(
    folder: Path,
    out: Path,
    strengths: Mapping[str, float],
    annotators: int | None = None,
    effects: Effects = Effects(ties=0.15),  # noqa: B008
    careless: Sequence[int] = (),
    seed: int = 0,
) -> int:
    """Copy a planned study and let nobody vote in it: to read its report, and mend its plan, before people are asked.

    All that was planned is asked: the same pairs with the same sides, so often, of so many people, with the same checks.

    Args:
        folder: of the study.
        out: folder to make; its title says that it is a rehearsal.
        strengths: of the arms, in logits, by name.
        annotators: how many, where they are to be others than planned.
        effects, careless, seed: as in `answers`.

    Returns:
        Number of votes.

    Raises:
        ValueError: no study, one that was not planned but imported, a folder that is there, or other arms than the study's.
    """
    from fewstep.study import database, folders, store

    folders.free(out)
    study = store.open_study(folder)
    try:
        record, slots = store.study_record(study.engine), store.slots(study.engine)
    finally:
        study.engine.dispose()
    plan = record["protocol"].get("design")
    if plan is None or not slots or slots[0]["contest"] < 0:
        raise ValueError(f"{folder} was not planned but imported: there is no plan to rehearse")
    if annotators is not None:
        if annotators < 1:
            raise ValueError(f"annotators must be 1 or more, not {annotators}")
        most = max(Counter(s["question"] for s in slots).values())
        plan = {**plan, "annotators": annotators, "normal_per_block": math.ceil(most / annotators)}
    if set(strengths) != {a["name"] for a in record["arms"]}:
        raise ValueError(f"strengths are needed of {', '.join(a['name'] for a in record['arms'])}")
    votes: list[dict[str, Any]] = []
    for number, question in enumerate(record["protocol"]["questions"]):
        golds = [p["pair_id"] for p in record["pairs"] if p["gold_answer"] is not None and p["question"] == question]
        given = handed_out([s for s in slots if s["question"] == question], golds, plan, question)
        votes += replay(record, given, strengths, effects, question, careless, seed + number, len(votes) + 1)
    finished = sorted({v["annotator"] for v in votes})
    named = {**record, "title": f"Rehearsal: {record['title']}", "finished": finished}
    with folders.new_folder(out) as partial:
        shutil.copytree(folder / store.IMAGES, partial / store.IMAGES)
        store.write_protocol(partial, record["protocol"])
        database.write(database.sqlite_url(partial / store.DATABASE), lambda engine: store.restore(engine, named, votes))
    return len(votes)


def _drawn(
    pairs: Sequence[Mapping[str, Any]], people: Ints, left: Any, strengths: Mapping[str, float], effects: Effects, rng: Any
) -> list[str]:
    """Choices of people (N,) on pairs (N), with arm a on the left or not (N,)."""
    names = list(strengths)
    first, second = (np.array([names.index(p[key]) for p in pairs]) for key in ("arm_a", "arm_b"))
    prompt, number = (np.array([p[key] for p in pairs]) for key in ("prompt", "seed"))
    none = np.zeros(len(pairs))
    asked = Table(tuple(names), first, second, none, none > 0, none > 0, left, prompt, people)
    plan = Design(asked, number, int(prompt.max()) + 1, int(number.max()) + 1, int(people.max()) + 1)
    drawn = draw(plan, np.array(list(strengths.values())), effects, rng)
    return [_choice(float(score), bool(bad)) for score, bad in zip(drawn.score, drawn.bad, strict=True)]


def _again(choice: str, rng: np.random.Generator) -> str:
    """Somebody's answer when a pair comes back: the same in four of five cases."""
    return choice if rng.random() < 0.8 else _choice(0.5 * rng.integers(3), False)


def _known(right: str, rng: np.random.Generator) -> str:
    """Somebody's answer to a gold pair."""
    return right if rng.random() < 0.96 else {"a": "b", "b": "a"}[right]


def _shown(pair: Mapping[str, Any], texts: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    kept = {key: pair[key] for key in ("pair_id", "prompt", "seed", "arm_a", "arm_b", "gold_answer")}
    kept |= {"prompt_text": texts[pair["prompt"]]["text"], "category": texts[pair["prompt"]]["category"]}
    return kept | {"kind": "normal" if pair["gold_answer"] is None else "gold", "repeat_of": None}


def _choice(score: float, bad: bool) -> str:
    if score == 0.5:
        return "both_bad" if bad else "tie"
    return "a" if score == 1 else "b"


def _record(
    out: list[dict[str, Any]], voter: Mapping[str, Any], row: dict[str, Any], rng: np.random.Generator, start: int
) -> dict[str, Any]:
    """Append a vote with what the browser and the clock would add."""
    lazy, number = voter["lazy"], start + len(out)
    made = {
        "vote_id": number, "annotator": voter["annotator"], "question": voter["question"], **row,
        "choice": str(rng.choice(["a", "b"])) if lazy else row["choice"],
        "rt_ms": int(rng.lognormal(6.0 if lazy else 8.6, 0.3 if lazy else 0.5)),
        "zoomed": bool(not lazy and rng.random() < 0.2), "viewport": "desktop",
        "at": (BEGUN + timedelta(seconds=7 * number)).isoformat(timespec="milliseconds"),
    }  # fmt: skip
    out.append(made)
    return made
