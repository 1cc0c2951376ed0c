"""What a study's database holds, written and read through the same statements on SQLite and Postgres.

Votes are never changed: taking one back is an event of its own. `votes` is the one way from here to analysis. Its rows, oldest
first, undone votes left out:

    vote_id      int       of this vote
    annotator    str       opaque; no name, no address, nothing of a recruiting service
    question     str       "quality" (prompt hidden) or "adherence" (prompt shown)
    prompt       int       its number in the benchmark
    prompt_text  str
    category     str
    seed         int       seed number of the images
    arm_a, arm_b str       names; a gold pair has the same arm twice, image a being the right one
    left_is_a    bool      what was shown on the left
    choice       str       "a", "b" (already turned back from left and right), "tie" or "both_bad"
    kind         str       "normal", "gold" or "repeat" (the annotator's own earlier pair, sides swapped)
    gold_answer  str|None  "a" or "b" of a gold pair
    repeat_of    int|None  vote_id of their earlier vote on a repeat's pair; None when that was taken back and not given again
    pair_id      int       of (prompt, seed, arm pair): votes of several people on one item share it, and repeats do
    rt_ms        int|None  from showing to answering, as the browser measured it
    zoomed       bool      whether the pair was enlarged
    viewport     str       "phone", "tablet", "desktop" or "unknown"
    at           str       ISO 8601, UTC, milliseconds
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fewstep.evaluate.benchmark import digest
from fewstep.study import tables as t
from fewstep.study.database import connect, reading, sqlite_url
from fewstep.study.tables import CHOICES, KINDS, QUESTIONS, VIEWPORTS

try:
    import sqlalchemy as sql
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise ValueError("studies need SQLAlchemy: pip install 'fewstep[web]'") from error

DATABASE, SECRET, PROTOCOL, IMAGES = "study.sqlite", "secret.key", "protocol.json", "images"  # see `folders`, too
SECRET_BYTES = 32
ROWS_AT_ONCE = 2000
FINISH = "finish"  # kind of the event that an annotator has answered all that they were given
NONE = type(None)
BOOLEANS: tuple[tuple[str, tuple[type, ...]], ...] = (("zoomed", (bool,)), ("left_is_a", (bool,)))


@dataclass(frozen=True)
class Store:
    """An open study.

    Attributes:
        engine: its database.
        folder: where images, protocol and secret lie.
        secret: 32 bytes that sign links, forms and completion codes; never in the database, never exported.
        protocol: as `protocol.json` has it.
        clock: seconds since 1970.
        owed: set while something that was deleted may still be in SQLite's log; see `ballots.tidy`.
    """

    engine: sql.Engine
    folder: Path
    secret: bytes
    protocol: Mapping[str, Any]
    clock: Callable[[], float] = time.time
    owed: threading.Event = field(default_factory=threading.Event, compare=False)


def open_study(folder: Path, url: str | None = None) -> Store:
    """Open a planned study.

    Args:
        folder: that `fewstep study plan` made.
        url: of its database; by default `study.sqlite` in the folder.

    Raises:
        ValueError: no study there, its database cannot be reached or is another study's, or its secret cannot be read.
    """
    if url is None and not (folder / DATABASE).is_file():
        raise ValueError(f"{folder} holds no study: make one with `fewstep study plan --arms DIR DIR --out {folder}`")
    engine = connect(url or sqlite_url(folder / DATABASE))
    try:
        with reading(engine) as connection:
            row = connection.execute(sql.select(t.study.c.protocol, t.study.c.sha)).first()
        if row is None:
            raise ValueError(f"the database of {folder} holds no study")
    except SQLAlchemyError as error:
        raise ValueError(f"the database of {folder} cannot be read ({type(error).__name__}): is it a study's?") from error
    try:
        told = {"hash": row.sha}
        if (folder / PROTOCOL).exists():
            told = json.loads((folder / PROTOCOL).read_text(encoding="utf-8"))
        secret = bytes.fromhex((folder / SECRET).read_text(encoding="ascii").strip()) if (folder / SECRET).exists() else b""
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{SECRET} or {PROTOCOL} of {folder} cannot be read ({error}): give this user the right to") from error
    if not isinstance(told, dict) or told.get("hash") != row.sha:
        raise ValueError(f"the database is not that of {folder}: the hash in its {PROTOCOL} is another study's")
    return Store(engine, folder, secret, json.loads(row.protocol))  # one that was imported has no secret: reports need none


def write_protocol(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Write what was settled into a study's folder, under its hash, for people to read."""
    text = json.dumps({"hash": digest(protocol), **protocol}, indent=1)
    (folder / PROTOCOL).write_text(text, encoding="utf-8")


def new_secret(folder: Path) -> bytes:
    """Make the study's secret, readable by its owner alone."""
    secret = secrets.token_bytes(SECRET_BYTES)
    handle = os.open(folder / SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secret.hex() + "\n")
    return secret


def create(
    engine: sql.Engine,
    record: Mapping[str, Any],
    slots: Sequence[Mapping[str, Any]] = (),
    restored: bool = False,
    votes: Sequence[tuple[sql.Table, list[dict[str, Any]]]] = (),
) -> None:
    """Write a study in one transaction.

    Args:
        engine: an empty database.
        record: as `study_record` gives it.
        slots: rows of `assignment` to be given out: question, contest, pair, prompt, left_is_a, turn.
        restored: whether it is only for analysis.
        votes: rows of further tables, of a study that is restored.

    Raises:
        ValueError: the database holds a study already, or the record lacks something.
    """
    try:
        rows = _rows(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"this is no record of a study ({type(error).__name__}: {error})") from error
    protocol = record["protocol"]
    head = {"id": 1, "title": str(record["title"]), "protocol": json.dumps(protocol), "sha": digest(protocol)}
    try:
        t.schema.create_all(engine)
        with engine.begin() as connection:
            if connection.execute(sql.select(t.study.c.id)).first():
                raise ValueError("the database holds a study already: give another one")
            connection.execute(t.study.insert(), {**head, "created": seconds(str(record["created"])), "restored": restored})
            for table, lines in [*rows, *votes]:
                _insert(connection, table, lines)
            fresh = {"kind": "normal", "attempt": 0, "done": False}
            _insert(connection, t.assignment, [{**slot, **fresh} for slot in slots])
    except (SQLAlchemyError, OverflowError) as error:
        why = "is the server there, and is every number of the study one that it can keep?"
        raise ValueError(f"the database refused the study ({type(error).__name__}), nothing was written: {why}") from error


def _rows(record: Mapping[str, Any]) -> list[tuple[sql.Table, list[dict[str, Any]]]]:
    """A record's lists as rows of tables."""
    numbers = {str(a["name"]): i for i, a in enumerate(record["arms"])}
    if len(numbers) != len(record["arms"]):
        raise ValueError("two arms have one name")
    arms = [{"id": i, "name": str(a["name"]), "sampling": json.dumps(a["sampling"])} for i, a in enumerate(record["arms"])]
    prompts = [
        {"id": int(p["prompt"]), "text": str(p["text"]), "category": str(p["category"]), "facts": json.dumps(p["facts"])}
        for p in record["prompts"]
    ]
    plain = ("id", "prompt", "seed", "degraded", "sha256", "width", "height")
    images = [{**{key: i[key] for key in plain}, "arm": numbers[i["arm"]]} for i in record["images"]]
    kept = ("prompt", "seed", "image_a", "image_b", "question", "gold_answer")
    pairs = [
        {**{key: p[key] for key in kept}, "id": p["pair_id"], "arm_a": numbers[p["arm_a"]], "arm_b": numbers[p["arm_b"]]}
        for p in record["pairs"]
    ]
    known = {i["id"] for i in images}
    wrong = [name for name in known if not isinstance(name, str) or not t.IMAGE_ID.fullmatch(name)]
    wrong += [name for p in pairs for name in (p["image_a"], p["image_b"]) if name is not None and name not in known]
    if wrong:  # names become paths: a record may come from anybody
        raise ValueError(f"{str(wrong[0])[:80]!r} is the id of no image of the study")
    return [(t.arm, arms), (t.prompt, prompts), (t.image, images), (t.pair, pairs)]


def _insert(connection: sql.Connection, table: sql.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        connection.execute(table.insert(), [dict(row) for row in rows[start : start + ROWS_AT_ONCE]])


def votes(engine: sql.Engine) -> list[dict[str, Any]]:
    """All votes that stand, oldest first; the rows are described at the top of this file."""
    v, a, p, who, text = t.vote, t.assignment, t.pair, t.annotator, t.prompt
    query = (
        sql.select(
            v.c.id, v.c.assignment, v.c.choice, v.c.rt_ms, v.c.zoomed, v.c.viewport, v.c.at, a.c.question, a.c.kind,
            a.c.left_is_a, a.c.repeat_of, who.c.code, p.c.id.label("pair"), p.c.prompt, p.c.seed, p.c.arm_a, p.c.arm_b,
            p.c.gold_answer, text.c.text, text.c.category,
        )
        .join_from(v, a, a.c.id == v.c.assignment)
        .join(p, p.c.id == a.c.pair)
        .join(text, text.c.id == p.c.prompt)
        .join(who, who.c.id == v.c.annotator)
        .where(stands(v))
        .order_by(v.c.id)
    )  # fmt: skip
    with reading(engine) as connection:
        names = {row.id: row.name for row in connection.execute(sql.select(t.arm))}
        rows = connection.execute(query).all()
    standing = {(row.assignment, row.code): row.id for row in rows}  # what was taken back may be somebody else's by now
    return [
        {
            "vote_id": r.id, "annotator": r.code, "question": r.question, "prompt": r.prompt, "prompt_text": r.text,
            "category": r.category, "seed": r.seed, "arm_a": names[r.arm_a], "arm_b": names[r.arm_b],
            "left_is_a": bool(r.left_is_a), "choice": r.choice, "kind": r.kind,
            "gold_answer": r.gold_answer, "repeat_of": standing.get((r.repeat_of, r.code)), "pair_id": r.pair, "rt_ms": r.rt_ms,
            "zoomed": bool(r.zoomed), "viewport": r.viewport, "at": iso(r.at),
        }
        for r in rows
    ]  # fmt: skip


def stands(vote: sql.Table) -> sql.ColumnElement[bool]:
    """That a vote was not taken back."""
    back = t.event.alias()
    return ~sql.exists().where(back.c.kind == "undo", back.c.vote == vote.c.id)


def finished(connection: sql.Connection) -> set[str]:
    """Pseudonyms of those who answered all that they were given, and took no answer back after that."""
    e, who = t.event, t.annotator
    last = sql.select(sql.func.max(e.c.id)).where(e.c.kind.in_((FINISH, "undo"))).group_by(e.c.annotator)
    query = sql.select(who.c.code).join(e, e.c.annotator == who.c.id).where(e.c.kind == FINISH, e.c.id.in_(last))
    has_voted = sql.exists().where(t.vote.c.annotator == who.c.id, stands(t.vote))
    return set(connection.execute(query.where(has_voted)).scalars())


def slots(engine: sql.Engine) -> list[dict[str, Any]]:
    """Everything that is to be asked, in order of turns: "question", "contest", "pair", "prompt", "left_is_a", "turn"."""
    a = t.assignment
    wanted = sql.select(a.c.question, a.c.contest, a.c.pair, a.c.prompt, a.c.left_is_a, a.c.turn).where(a.c.kind == "normal")
    with reading(engine) as connection:
        return [dict(row._mapping) for row in connection.execute(wanted.order_by(a.c.turn, a.c.id))]


def study_record(engine: sql.Engine) -> dict[str, Any]:
    """What the study is, without its votes, and of its people nothing but who finished.

    Returns:
        "title", "protocol" (a dictionary), "hash" (of the protocol), "created" (ISO), "arms" ({"name", "sampling"}), "prompts"
        ({"prompt", "text", "category", "facts"}), "images" ({"id", "arm" (name), "prompt", "seed", "degraded", "sha256",
        "width", "height"}; the file is images/ID.png), "pairs" ({"pair_id", "prompt", "seed", "arm_a", "arm_b", "image_a",
        "image_b", "question", "gold_answer"}; of gold pairs alone the last two are told) and "finished" (see `finished`).
    """
    with reading(engine) as connection:
        head = connection.execute(sql.select(t.study)).one()
        names = {row.id: row.name for row in connection.execute(sql.select(t.arm))}
        whole = sorted(finished(connection))
        found = {
            table.name: [dict(row._mapping) for row in connection.execute(sql.select(table).order_by(table.c.id))]
            for table in (t.arm, t.prompt, t.image, t.pair)
        }
    return {
        "title": head.title,
        "protocol": json.loads(head.protocol),
        "hash": head.sha,
        "created": iso(head.created),
        "arms": [{"name": a["name"], "sampling": json.loads(a["sampling"])} for a in found["arm"]],
        "prompts": [
            {"prompt": p["id"], "text": p["text"], "category": p["category"], "facts": json.loads(p["facts"])}
            for p in found["prompt"]
        ],
        "images": [{**i, "arm": names[i["arm"]]} for i in found["image"]],
        "pairs": [
            {"pair_id": p.pop("id"), **p, "arm_a": names[p["arm_a"]], "arm_b": names[p["arm_b"]]} for p in found["pair"]
        ],
        "finished": whole,
    }


def restore(engine: sql.Engine, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write an exported study into an empty database, so that `votes` and `study_record` give back what was exported.

    It can be analysed, but not served: nobody's link, consent or lease is in an export.

    Raises:
        ValueError: the record or a vote is malformed; nothing is written then.
    """
    if digest(record.get("protocol")) != record.get("hash"):
        raise ValueError("the record's protocol does not have the hash it was written with: it was changed, or is damaged")
    try:
        known = {int(p["pair_id"]): p for p in record["pairs"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the record lists no pairs ({type(error).__name__}: {error})") from error
    people: dict[str, int] = {}
    asked: list[dict[str, Any]] = []
    given: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        try:
            _check_vote(row, known)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"vote {number} of the export is malformed ({type(error).__name__}: {error})") from error
        who = people.setdefault(str(row["annotator"]), len(people) + 1)
        own = int(row["vote_id"])
        asked.append({
            "id": own, "question": row["question"], "contest": -1, "pair": row["pair_id"], "prompt": row["prompt"],
            "kind": row["kind"], "left_is_a": row["left_is_a"], "turn": 0, "repeat_of": row["repeat_of"], "annotator": who,
            "position": number, "attempt": 0, "done": True,
        })  # fmt: skip
        given.append({
            "id": own, "annotator": who, "assignment": own, "attempt": 0, "client_seq": number, "choice": row["choice"],
            "rt_ms": row["rt_ms"], "zoomed": row["zoomed"], "viewport": row.get("viewport", "unknown"),
            "at": seconds(row["at"]),
        })  # fmt: skip
    if len({line["id"] for line in given}) != len(given):
        raise ValueError("two votes of the export have one vote_id")
    whole = record.get("finished", [])  # exports of older versions do not tell
    if not isinstance(whole, list) or not all(isinstance(code, str) and code in people for code in whole):
        raise ValueError("the record's finished people are not those who voted")
    ends = [{"at": 0.0, "annotator": people[code], "kind": FINISH, "payload": "{}"} for code in whole]
    lines = [{"id": i, "code": code, "status": "restored", "begun": 0, "created": 0.0} for code, i in people.items()]
    rows_of = [(t.annotator, lines), (t.assignment, asked), (t.vote, given), (t.event, ends)]
    create(engine, record, restored=True, votes=rows_of)


def _check_vote(row: Mapping[str, Any], pairs: Mapping[int, Mapping[str, Any]]) -> None:
    known = pairs[row["pair_id"]]
    if row["kind"] != "gold" and row["arm_a"] == row["arm_b"]:
        raise ValueError(f"{str(row['arm_a'])[:40]!r} against itself is no comparison")
    for key, allowed in (("question", QUESTIONS), ("choice", CHOICES), ("kind", KINDS)):
        if row[key] not in allowed:
            raise ValueError(f"{key} is {row[key]!r}, not one of {', '.join(allowed)}")
    for key in ("prompt", "seed", "arm_a", "arm_b", "gold_answer"):
        if row[key] != known[key]:
            raise ValueError(f"{key} is not that of its pair")
    if row.get("viewport", "unknown") not in VIEWPORTS or not 1 <= len(str(row["annotator"])) <= 32:
        raise ValueError("unknown viewport, or no annotator")
    for key, kinds in (("vote_id", (int,)), ("rt_ms", (int, NONE)), ("repeat_of", (int, NONE)), *BOOLEANS):
        if type(row[key]) not in kinds:  # True is an int to isinstance
            raise ValueError(f"{key} is {row[key]!r}")


def iso(at: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def seconds(text: str) -> float:
    """The way back from `iso`.

    Raises:
        ValueError: no such time.
    """
    return datetime.fromisoformat(text).timestamp()
