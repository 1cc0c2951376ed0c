"""Which pair an annotator is shown: leases on slots, gold and repeated pairs, blocks.

A pair that is shown is leased to its annotator; a lease that runs out, or an annotator who withdraws, gives it back, so what
was not answered is answered by somebody else and sides stay balanced. Every annotator gets the arm pair that they have seen
least, and of it a prompt that they have seen least. The next pair is leased too, so that its images can be fetched.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import sqlalchemy as sql

from fewstep.study import design, links
from fewstep.study import tables as t
from fewstep.study.store import FINISH, Store, finished, stands

AHEAD = 2  # pairs held by one annotator: the one shown, and the next
DAY = 86400.0
GOLD = -1  # contest of gold pairs


class Shown(NamedTuple):
    """A pair as the page needs it. Nothing of it tells which arm an image is from."""

    assignment: int
    left: str
    right: str
    width: int
    height: int
    prompt: list[tuple[str, bool]]  # empty where it is hidden
    ahead: tuple[str, ...]  # images of the next pair


class Now(NamedTuple):
    """Where an annotator is.

    Attributes:
        stage: "consent", "intro" (of the block `question`), "pair", "wait" (what is left is before other people just now),
            "rest" (a day's worth is done), "done" or "withdrawn".
        question: of the block, or "".
        block: number of the block, from 1.
        shown: the pair, at stage "pair".
        seq: number that the next vote is to carry.
        undo: the vote that can be taken back, if any.
        answered, total: pairs of all blocks, as far as any are left.
        code: completion code, at stage "done".
    """

    stage: str
    question: str = ""
    block: int = 0
    shown: Shown | None = None
    seq: int = 1
    undo: int | None = None
    answered: int = 0
    total: int = 0
    code: str = ""


def duration(store: Store) -> float:
    """Seconds that a lease lasts."""
    return 60.0 * float(store.protocol["lease_minutes"])


def kinds(store: Store, who: int, question: str) -> list[design.Kind]:
    """What an annotator's block holds; computed again each time, and the same each time."""
    return design.block_of(store.protocol["design"], who, question)


def last_vote(connection: sql.Connection, who: int) -> int | None:
    """The annotator's last vote that stands."""
    standing = sql.select(sql.func.max(t.vote.c.id)).where(t.vote.c.annotator == who, stands(t.vote))
    return connection.execute(standing).scalar()


def last_seq(connection: sql.Connection, who: int) -> int:
    """Number of the annotator's last vote, taken back or not; 0 before the first."""
    return connection.execute(sql.select(sql.func.max(t.vote.c.client_seq)).where(t.vote.c.annotator == who)).scalar() or 0


def now(connection: sql.Connection, store: Store, person: Any) -> Now:
    """Where an annotator is; leases what they are to be shown.

    Args:
        connection: in a transaction that holds the annotator's row.
        store: the study.
        person: that row.
    """
    if person.status == "withdrawn":
        return Now("withdrawn")
    order = design.question_order(store.protocol["design"]["seed"], person.id - 1, store.protocol["questions"])
    if person.status != "active":
        return Now("consent", total=sum(_length(connection, store, person.id, q, []) for q in order))
    seq, undo = 1 + last_seq(connection, person.id), last_vote(connection, person.id)
    mine = connection.execute(sql.select(t.assignment).where(t.assignment.c.annotator == person.id)).all()
    answered = sum(bool(row.done) for row in mine)
    total = sum(_length(connection, store, person.id, q, mine) for q in order)
    told: dict[str, Any] = {"seq": seq, "undo": undo, "answered": answered, "total": total}
    if answered < total and until_tomorrow(connection, store, person.id):
        return Now("rest", **told)
    for block, question in enumerate(order, 1):
        pending = _pending(connection, store, person.id, question, mine)
        if pending:
            read = person.begun >= block
            shown = _shown(connection, question, pending) if read else None
            told["total"] = max(total, answered + 1)  # a check can be left when nothing else is
            return Now("pair" if read else "intro", question, block, shown, **told)
    if answered < total:
        return Now("wait", **told)
    if answered and person.code not in finished(connection):
        event = {"at": store.clock(), "annotator": person.id, "kind": FINISH, "payload": "{}"}
        connection.execute(t.event.insert(), event)
    return Now("done", code=links.completion_code(store.secret, person.code), **told)


def until_tomorrow(connection: sql.Connection, store: Store, who: int) -> int:
    """Seconds until an annotator may go on who has answered a day's worth (days are those of UTC); else 0."""
    at = store.clock()
    midnight = at - at % DAY
    today = sql.select(sql.func.count()).select_from(t.vote).where(t.vote.c.annotator == who, t.vote.c.at >= midnight)
    return int(midnight + DAY - at) + 1 if connection.execute(today).scalar_one() >= store.protocol["daily_cap"] else 0


def _length(connection: sql.Connection, store: Store, who: int, question: str, mine: Sequence[Any]) -> int:
    """Pairs of an annotator's block: those that they have, and of the rest as many as are open or before other people."""
    a = t.assignment
    own = [row for row in mine if row.question == question]
    position = 1 + max((row.position for row in own), default=-1)
    rest = len(kinds(store, who, question)) - position
    if rest <= 0:
        return len(own)
    seen = {row.pair for row in own if row.kind == "normal"}
    unanswered = sql.select(a.c.pair).where(a.c.question == question, ~a.c.done, a.c.kind == "normal")
    # a few more than are wanted, so that those that were seen need not be told to the database
    found = connection.execute(unanswered.distinct().limit(rest + len(seen))).scalars()
    return len(own) + min(rest, len(set(found) - seen))


def _pending(connection: sql.Connection, store: Store, who: int, question: str, mine: Sequence[Any]) -> list[int]:
    """Assignments to be answered now and next, leased; none at the end of a block, or when nothing is open."""
    own = sorted((row for row in mine if row.question == question), key=lambda row: row.position)
    pending = [row.id for row in own if not row.done]
    block = kinds(store, who, question)
    position = own[-1].position + 1 if own else 0
    rng = random.Random(f"{store.protocol['design']['seed']}:{who}:{question}:{position}")
    until = store.clock() + duration(store)
    every = list(mine)
    while len(pending) < AHEAD and position < len(block):
        leased = None
        if block[position] == "gold":
            leased = _gold(connection, who, question, own, rng)
        elif block[position] == "repeat":
            leased = _repeat(connection, question, own, position, rng)
        leased = leased or _slot(connection, store, who, question, every, rng)
        if leased is None:
            break
        held = {"annotator": who, "position": position, "leased_until": until}
        connection.execute(t.assignment.update().where(t.assignment.c.id == leased).values(**held))
        row = connection.execute(sql.select(t.assignment).where(t.assignment.c.id == leased)).one()
        own.append(row)
        every.append(row)
        pending.append(leased)
        position += 1
    stale = (t.assignment.c.id.in_(pending), t.assignment.c.leased_until < until - duration(store) / 2)
    connection.execute(t.assignment.update().where(*stale).values(leased_until=until))
    return pending


def _slot(
    connection: sql.Connection, store: Store, who: int, question: str, mine: Sequence[Any], rng: random.Random
) -> int | None:
    """Lease an open slot: of the arm pair seen least, the prompt seen least, the side seen less, whose turn is first."""
    a = t.assignment
    normal = [row for row in mine if row.kind == "normal" and row.question == question]
    seen = Counter(row.prompt for row in mine)
    contests = list(range(store.protocol["design"]["contests"]))
    rng.shuffle(contests)
    times = Counter(row.contest for row in normal)
    is_open = (a.c.question == question, ~a.c.done, a.c.kind == "normal")
    is_free = sql.or_(a.c.annotator.is_(None), sql.and_(a.c.annotator != who, a.c.leased_until < store.clock()))
    for contest in sorted(contests, key=lambda c: times[c]):
        lefts = sum(1 if row.left_is_a else -1 for row in normal if row.contest == contest)
        query = sql.select(a.c.id, a.c.prompt, a.c.left_is_a, a.c.turn).where(*is_open, a.c.contest == contest, is_free)
        if normal:
            query = query.where(a.c.pair.not_in([row.pair for row in normal]))
        found = connection.execute(query.order_by(a.c.turn).limit(design.CANDIDATES)).all()
        for row in sorted(found, key=lambda r: (seen[r.prompt], lefts * (1 if r.left_is_a else -1) > 0, r.turn)):
            # Held by another transaction: passed over, so that nobody waits for anybody, in whatever order they take slots.
            held = sql.select(a.c.id).where(a.c.id == row.id, ~a.c.done, is_free).with_for_update(skip_locked=True)
            if connection.execute(held).first():
                return int(row.id)
    return None


def _gold(connection: sql.Connection, who: int, question: str, own: Sequence[Any], rng: random.Random) -> int | None:
    """Make an assignment of a gold pair that the annotator has not seen; which side is right is balanced over their block."""
    had = [row for row in own if row.kind == "gold"]
    query = sql.select(t.pair.c.id, t.pair.c.prompt).where(t.pair.c.gold_answer.is_not(None), t.pair.c.question == question)
    pool = [row for row in connection.execute(query.order_by(t.pair.c.id)) if row.id not in {r.pair for r in had}]
    if not pool:
        return None
    seen = Counter(row.prompt for row in own)
    fewest = min(seen[row.prompt] for row in pool)
    chosen = rng.choice([row for row in pool if seen[row.prompt] == fewest])
    lefts = sum(1 if row.left_is_a else -1 for row in had)
    left_is_a = lefts < 0 or (lefts == 0 and rng.random() < 0.5)
    told = {"question": question, "kind": "gold", "contest": GOLD, "pair": chosen.id, "prompt": chosen.prompt}
    return _make(connection, **told, left_is_a=left_is_a)


def _repeat(connection: sql.Connection, question: str, own: Sequence[Any], position: int, rng: random.Random) -> int | None:
    """Make an assignment of a pair that the annotator has had some time ago, sides swapped."""
    again = {row.repeat_of for row in own}
    past = [r for r in own if r.kind == "normal" and r.position <= position - design.SPACING and r.id not in again]
    if not past:
        return None
    first = rng.choice(past)
    told = {"question": question, "kind": "repeat", "contest": first.contest, "pair": first.pair, "prompt": first.prompt}
    return _make(connection, **told, left_is_a=not first.left_is_a, repeat_of=first.id)


def _make(connection: sql.Connection, **values: Any) -> int:
    line = {**values, "turn": 0, "attempt": 0, "done": False}
    return int(connection.execute(t.assignment.insert().returning(t.assignment.c.id), line).scalar_one())


def _shown(connection: sql.Connection, question: str, pending: Sequence[int]) -> Shown:
    """The pair at hand for the page, with the images of the one after."""
    a, p = t.assignment, t.pair
    query = (
        sql.select(a.c.id, a.c.left_is_a, p.c.image_a, p.c.image_b, t.image.c.width, t.image.c.height)
        .add_columns(t.prompt.c.text, t.prompt.c.facts)
        .join_from(a, p, p.c.id == a.c.pair)
        .join(t.image, t.image.c.id == p.c.image_a)
        .join(t.prompt, t.prompt.c.id == p.c.prompt)
        .where(a.c.id.in_(pending[:AHEAD]))
    )
    rows = {row.id: row for row in connection.execute(query)}
    row, after = rows[pending[0]], [rows[i] for i in pending[1:AHEAD]]
    left, right = (row.image_a, row.image_b) if row.left_is_a else (row.image_b, row.image_a)
    pieces = design.highlight(row.text, json.loads(row.facts)) if question == "adherence" else []
    ahead = tuple(name for one in after for name in (one.image_a, one.image_b))
    return Shown(row.id, left, right, row.width, row.height, pieces, ahead)
