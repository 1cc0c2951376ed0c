"""Who took back what they said: an answer that is somebody else's by now, and people who end without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sql
from study_help import answer, ready, tiny_study

from fewstep.study import ballots, exchange, store
from fewstep.study import tables as t
from fewstep.study.leases import Now
from fewstep.study.store import Store

NO_CHECKS = {"arms": 2, "gold": 0, "repeat": 0, "overlap": 0, "annotators": 1}


class Clock:
    at = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


def to_the_end(study: Store, who: int, now: Now) -> Now:
    while now.stage in ("pair", "intro"):
        now = answer(study, who, "right", now)
    return now


def finished(study: Store) -> set[str]:
    with store.reading(study.engine) as connection:
        return store.finished(connection)


def ends(study: Store) -> list[int | None]:
    with store.reading(study.engine) as connection:
        return list(connection.execute(sql.select(t.event.c.annotator).where(t.event.c.kind == store.FINISH)).scalars())


def test_who_took_back_all_they_said_has_not_finished(tmp_path: Path) -> None:
    clock = Clock()
    study = tiny_study(tmp_path, clock, lease_minutes=30, **NO_CHECKS)
    who, now = ready(study)
    now = answer(study, who, "left", now)
    ballots.undo(study, who, now.undo or 0)
    clock.at += 3600  # their pair is anybody's
    other, now = ready(study)
    assert to_the_end(study, other, now).stage == "done" and ballots.now(study, who).stage == "done"
    voters = {v["annotator"] for v in store.votes(study.engine)}
    assert finished(study) == voters and ends(study) == [other]
    with study.engine.begin() as connection:  # as older versions wrote it
        connection.execute(t.event.insert(), {"at": clock(), "annotator": who, "kind": store.FINISH, "payload": "{}"})
    assert finished(study) == voters
    votes = store.votes(study.engine)
    study.engine.dispose()
    exchange.export(study.folder, tmp_path / "out.zip")
    assert exchange.import_(tmp_path / "out.zip", tmp_path / "again") == len(votes) == 24


def test_who_comes_when_all_is_answered_leaves_no_trace_however_often_they_look(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, **NO_CHECKS)
    first, now = ready(study)
    to_the_end(study, first, now)
    late, now = ready(study)
    assert {ballots.now(study, late).stage for _ in range(3)} == {"done"} and ends(study) == [first]
    ballots.withdraw(study, first)  # pairs are open again
    answer(study, late, "left")
    assert finished(study) == set()  # one answer of many does not make an end


def test_a_repeat_is_never_compared_with_somebody_elses_answer(tmp_path: Path) -> None:
    clock = Clock()
    study = tiny_study(tmp_path, clock, lease_minutes=30, **{**NO_CHECKS, "repeat": 0.3})
    who, now = ready(study)
    first: int | None = None
    while first is None:  # until they hold a repeat
        now = answer(study, who, "left", now)
        with store.reading(study.engine) as connection:
            held = sql.select(t.assignment.c.repeat_of).where(t.assignment.c.annotator == who, t.assignment.c.kind == "repeat")
            first = connection.execute(held).scalar()
    done = sql.select(t.assignment.c.done).where(t.assignment.c.id == first)
    while store_value(study, done):
        now = ballots.undo(study, who, now.undo or 0)
    clock.at += 3600
    other, later = ready(study)
    to_the_end(study, other, later)
    to_the_end(study, who, ballots.now(study, who))
    votes = {v["vote_id"]: v for v in store.votes(study.engine)}
    repeats = [v for v in votes.values() if v["kind"] == "repeat"]
    assert len({v["annotator"] for v in repeats}) == 2
    assert [v for v in repeats if v["repeat_of"] is None]  # the first time was taken back
    assert all(votes[v["repeat_of"]]["annotator"] == v["annotator"] for v in repeats if v["repeat_of"] is not None)


def store_value(study: Store, query: sql.Select[tuple[bool]]) -> bool:
    with store.reading(study.engine) as connection:
        return bool(connection.execute(query).scalar())


def test_an_export_can_be_imported_though_somebody_leaves_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(tmp_path, **{**NO_CHECKS, "annotators": 2})
    who, now = ready(study)
    assert to_the_end(study, who, now).stage == "done"
    stays, now = ready(study)
    answer(study, stays, "left", now)
    read = store.votes

    def meanwhile(engine: sql.Engine) -> list[dict[str, object]]:
        ballots.withdraw(study, who)
        return read(engine)

    monkeypatch.setattr(store, "votes", meanwhile)
    exchange.export(study.folder, tmp_path / "out.zip")
    assert exchange.import_(tmp_path / "out.zip", tmp_path / "again") == 1
