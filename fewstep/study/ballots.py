"""What happens to a study while people answer: enrolment, leases, votes, taking back, leaving. Each is one transaction.

An answer is counted once however often it is sent, and never changed: taking it back is an event, and withdrawing deletes it.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite

from fewstep.study import leases, links
from fewstep.study import tables as t
from fewstep.study.database import fold, reading
from fewstep.study.leases import DAY, Now
from fewstep.study.store import Store, stands

MOST_LINKS = 10_000


class Turned(ValueError):
    """A request that is refused. `status` is HTTP's; `after` are seconds to wait, if waiting helps."""

    def __init__(self, status: int, message: str, after: int = 0) -> None:
        super().__init__(message)
        self.status, self.after = status, after


def enrol(store: Store, external: str | None = None, study_ref: str | None = None, session_ref: str | None = None) -> int:
    """Add an annotator; one with a known external id is found again.

    Returns:
        The annotator's number.
    """
    known = sql.select(t.annotator.c.id).where(t.annotator.c.external_id == external)
    with store.engine.begin() as connection:
        if external is not None and (number := connection.execute(known).scalar()) is not None:
            return int(number)
        row = {
            "code": secrets.token_hex(6), "external_id": external, "study_ref": study_ref, "session_ref": session_ref,
            "status": "invited", "begun": 0, "created": store.clock(),
        }  # fmt: skip
        insert = (postgresql if store.engine.dialect.name == "postgresql" else sqlite).insert(t.annotator)
        once = insert.on_conflict_do_nothing(index_elements=["external_id"])  # of two clicks at once, one comes second
        made = connection.execute(once.values(row).returning(t.annotator.c.id)).scalar()
        return int(connection.execute(known).scalar_one() if made is None else made)


def personal_links(store: Store, count: int, base: str, days: float, again: int | None = None) -> list[str]:
    """Links for new annotators, or a new one for the annotator numbered `again`.

    Raises:
        ValueError: nothing asked for, an address that is none, or no such annotator.
    """
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"--base must begin with http:// or https://, not {base[:80]!r}")
    links.check_days(days, "--days")
    if again is None and not 1 <= count <= MOST_LINKS:
        raise ValueError(f"say how many links are wanted, 1 to {MOST_LINKS}: fewstep study links FOLDER 20")
    expires = int(store.clock() + days * DAY)
    if again is not None:
        with reading(store.engine) as connection:
            if connection.execute(sql.select(t.annotator.c.id).where(t.annotator.c.id == again)).first() is None:
                raise ValueError(f"the study has no annotator {again}: see fewstep study links FOLDER --codes")
    links.mac(store.secret, "check", "")  # before anybody is enrolled
    numbers = [enrol(store) for _ in range(count)] if again is None else [again]
    return [f"{base.rstrip('/')}/s/{links.sign(store.secret, number, expires)}" for number in numbers]


def now(store: Store, who: int) -> Now:
    """Where an annotator is; leases what they are to be shown.

    Raises:
        Turned: no such annotator.
    """
    with store.engine.begin() as connection:
        return leases.now(connection, store, _person(connection, who))


def consent(store: Store, who: int) -> Now:
    """The annotator agrees to take part."""
    with store.engine.begin() as connection:
        person = _person(connection, who)
        if person.status == "invited":
            values = {"status": "active", "consent_at": store.clock()}
            connection.execute(t.annotator.update().where(t.annotator.c.id == who).values(**values))
            _record(connection, store, who, "consent")
        return leases.now(connection, store, _person(connection, who))


def begin(store: Store, who: int, block: int) -> Now:
    """The annotator has read the introduction of a block, counted from 1. A block that has begun is left as it is."""
    with store.engine.begin() as connection:
        person = _active(connection, who)
        if person.begun < block <= len(store.protocol["questions"]):  # an earlier block may have had nothing left
            connection.execute(t.annotator.update().where(t.annotator.c.id == who).values(begun=block))
            _record(connection, store, who, "begin", {"block": block})
        return leases.now(connection, store, _person(connection, who))


def vote(
    store: Store,
    who: int,
    assignment: int,
    side: str,
    seq: int,
    rt_ms: int | None = None,
    zoomed: bool = False,
    viewport: str = "unknown",
) -> Now:
    """Count an answer. The same answer sent again changes nothing, however often it comes.

    Args:
        store: the study.
        who: the annotator.
        assignment: what was shown; that it was shown to them is the caller's to know, by the form's token.
        side: "left", "right", "tie" or "both_bad".
        seq: number of this answer, as `Now` told it.
        rt_ms, zoomed, viewport: see `store`.

    Raises:
        Turned: 409 for an answer out of order, or too late (it is kept as an event); 429 after a day's worth.
    """
    with store.engine.begin() as connection:
        person = _active(connection, who)
        own = t.vote.c.annotator == who
        known = connection.execute(sql.select(t.vote.c.assignment).where(own, t.vote.c.client_seq == seq)).scalar()
        if known == assignment:
            return leases.now(connection, store, person)
        if known is not None or seq != leases.last_seq(connection, who) + 1:
            raise Turned(409, "This answer is not the next one: this study is open in another window. Please reload this page.")
        _within_cap(connection, store, who)
        row = connection.execute(sql.select(t.assignment).where(t.assignment.c.id == assignment)).first()
        held = (t.assignment.c.id == assignment, t.assignment.c.annotator == who, ~t.assignment.c.done)
        taken = connection.execute(t.assignment.update().where(*held).values(done=True, leased_until=None))
        if row is not None and taken.rowcount == 1:
            sides = {"left": "a" if row.left_is_a else "b", "right": "b" if row.left_is_a else "a"}
            line = {
                "annotator": who, "assignment": assignment, "attempt": row.attempt, "client_seq": seq,
                "choice": sides.get(side, side), "rt_ms": rt_ms, "zoomed": zoomed, "viewport": viewport,
                "at": round(store.clock(), 3),
            }  # fmt: skip
            connection.execute(t.vote.insert(), line)
            return leases.now(connection, store, person)
        _record(connection, store, who, "late", {"assignment": assignment, "side": side, "rt_ms": rt_ms})
    raise Turned(409, "This pair was open for so long that it was given to somebody else. Please reload this page and go on.")


def undo(store: Store, who: int, vote_id: int) -> Now:
    """Take back an annotator's last vote: an event, after which the pair is shown again. Done twice, it is done once.

    Raises:
        Turned: 409 if it is not their last vote.
    """
    with store.engine.begin() as connection:
        person = _active(connection, who)
        row = connection.execute(sql.select(t.vote).where(t.vote.c.id == vote_id, t.vote.c.annotator == who)).first()
        gone = connection.execute(sql.select(t.event.c.id).where(t.event.c.kind == "undo", t.event.c.vote == vote_id)).first()
        if row is not None and gone is not None:
            return leases.now(connection, store, person)
        if row is None or leases.last_vote(connection, who) != vote_id:
            raise Turned(409, "Only your last answer can be taken back. Please reload this page.")
        _record(connection, store, who, "undo", vote=vote_id)
        again = {"done": False, "attempt": t.assignment.c.attempt + 1, "leased_until": store.clock() + leases.duration(store)}
        connection.execute(t.assignment.update().where(t.assignment.c.id == row.assignment).values(**again))
        return leases.now(connection, store, person)


def withdraw(store: Store, who: int) -> None:
    """Delete an annotator's votes, events and identity for good. Their pairs are open again; their link says what was done.

    Nothing that names them is kept, so a recruiting service can send them again, and they are then somebody new.
    """
    with store.engine.begin() as connection:
        _person(connection, who)
        mine = t.assignment.c.annotator == who
        connection.execute(t.vote.delete().where(t.vote.c.annotator == who))
        connection.execute(t.event.delete().where(t.event.c.annotator == who))
        connection.execute(t.assignment.delete().where(mine, t.assignment.c.kind != "normal"))
        free = {"annotator": None, "position": None, "leased_until": None, "done": False, "attempt": t.assignment.c.attempt + 1}
        connection.execute(t.assignment.update().where(mine).values(**free))
        nobody = {"external_id": None, "study_ref": None, "session_ref": None, "consent_at": None, "status": "withdrawn"}
        connection.execute(t.annotator.update().where(t.annotator.c.id == who).values(**nobody))
        connection.execute(t.event.insert(), {"at": store.clock(), "annotator": None, "kind": "withdrawn", "payload": "{}"})
    store.owed.set()
    tidy(store)


def tidy(store: Store) -> None:
    """Take what was deleted out of SQLite's log, too, if that is still owed; it stays owed while another program reads.

    Nobody is made to wait for that program: the server calls this at every request.
    """
    if store.owed.is_set():
        store.owed.clear()  # first: somebody may leave meanwhile
        if not fold(store.engine, wait_ms=0):
            store.owed.set()


def progress(store: Store) -> dict[str, Any]:
    """How far the study is: "wanted" and "answered" slots by question, annotators by status, "votes" that stand."""
    a = t.assignment
    count = sql.func.count()
    with reading(store.engine) as connection:
        grouped = sql.select(a.c.question, a.c.done, count).where(a.c.kind == "normal").group_by(a.c.question, a.c.done)
        by_question: dict[str, dict[str, int]] = {q: {"wanted": 0, "answered": 0} for q in store.protocol["questions"]}
        for question, done, number in connection.execute(grouped):
            by_question[question]["wanted"] += number
            by_question[question]["answered"] += number if done else 0
        people = connection.execute(sql.select(t.annotator.c.status, count).group_by(t.annotator.c.status))
        standing = connection.execute(sql.select(count).select_from(t.vote).where(stands(t.vote))).scalar_one()
        return {"questions": by_question, "annotators": {s: n for s, n in people}, "votes": standing}


def people(store: Store) -> list[dict[str, Any]]:
    """Everybody who has not withdrawn: "number", "code", "external_id", "status", "votes" (that stand), "completion_code"."""
    with reading(store.engine) as connection:
        counted = sql.select(t.vote.c.annotator, sql.func.count()).where(stands(t.vote)).group_by(t.vote.c.annotator)
        votes = {who: number for who, number in connection.execute(counted)}
        here = sql.select(t.annotator).where(t.annotator.c.status != "withdrawn")
        rows = connection.execute(here.order_by(t.annotator.c.id)).all()
    return [
        {"number": r.id, "code": r.code, "external_id": r.external_id or "", "status": r.status, "votes": votes.get(r.id, 0),
         "completion_code": links.completion_code(store.secret, r.code)}
        for r in rows
    ]  # fmt: skip


def _person(connection: sql.Connection, who: int) -> Any:
    """An annotator's row, held until the transaction ends: their requests, from whatever device, go one after another."""
    row = connection.execute(sql.select(t.annotator).where(t.annotator.c.id == who).with_for_update()).first()
    if row is None or row.status == "restored":
        raise Turned(404, "This study does not know you: the link belongs to another one.")
    return row


def _active(connection: sql.Connection, who: int) -> Any:
    person = _person(connection, who)
    if person.status != "active":
        raise Turned(403, "You are not taking part in this study: please open your personal link first.")
    return person


def _within_cap(connection: sql.Connection, store: Store, who: int) -> None:
    wait = leases.until_tomorrow(connection, store, who)
    if wait:
        raise Turned(429, "That was a full day's work, thank you. Please come back tomorrow with the same link.", wait)


def _record(
    connection: sql.Connection, store: Store, who: int, kind: str, payload: Any = None, vote: int | None = None
) -> None:
    line = {"at": store.clock(), "annotator": who, "kind": kind, "vote": vote, "payload": json.dumps(payload or {})}
    connection.execute(t.event.insert(), line)
