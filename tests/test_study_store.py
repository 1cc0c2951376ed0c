"""Leases, votes, taking back, leaving, balance: on SQLite here, and the same tests on Postgres in test_study_postgres."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from study_help import answer, everybody, ready, tiny_study

from fewstep.study import ballots, links, store
from fewstep.study import tables as t
from fewstep.study.ballots import Turned
from fewstep.study.store import Store

Planned = Callable[..., Store]


class Clock:
    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """A function that plans a study of its own."""
    return lambda **wishes: tiny_study(tmp_path, **wishes)


def balance(votes: list[dict[str, Any]]) -> Counter[int]:
    """How often each difference of lefts and rights occurs over (question, arm pair, prompt)."""
    cells: Counter[tuple[Any, ...]] = Counter()
    for v in votes:
        if v["kind"] == "normal":
            cells[v["question"], v["arm_a"], v["arm_b"], v["prompt"]] += 1 if v["left_is_a"] else -1
    return Counter(cells.values())


def test_a_finished_study_is_balanced_in_every_respect(planned: Planned) -> None:
    study = planned(annotators=5, gold=0.1, repeat=0.1, overlap=0.15)
    people = [ballots.enrol(study) for _ in range(7)]
    everybody(study, people, random.Random(0))
    votes = store.votes(study.engine)
    state = ballots.progress(study)
    assert all(q["answered"] == q["wanted"] for q in state["questions"].values())
    assert state["votes"] == len(votes)
    assert balance(votes) == {0: 2 * 6 * 6}  # questions x arm pairs x prompts

    contests: dict[Any, Counter[Any]] = defaultdict(Counter)
    seen: Counter[Any] = Counter()
    for v in votes:
        if v["kind"] == "normal":
            contests[v["annotator"], v["question"]][v["arm_a"], v["arm_b"]] += 1
            seen[v["annotator"], v["question"], v["pair_id"]] += 1
    first = {v["annotator"]: v["question"] for v in reversed(votes)}
    for (who, question), counts in contests.items():
        if question == first[who]:  # in second blocks of this small study pairs run out
            assert max(counts.values()) - min(counts.get(c, 0) for c in contests[who, question]) <= 1 and len(counts) == 6
    assert set(seen.values()) == {1}  # nobody is asked the same twice, repeats apart
    people_of: dict[Any, set[str]] = defaultdict(set)
    for v in votes:
        if v["kind"] == "normal":
            people_of[v["question"], v["pair_id"]].add(v["annotator"])
    assert sum(len(p) >= 3 for p in people_of.values()) >= 0.15 * len(people_of)

    by_id = {v["vote_id"]: v for v in votes}
    for v in votes:
        assert (v["gold_answer"] is not None) == (v["kind"] == "gold")
        if v["kind"] == "repeat":
            before = by_id[v["repeat_of"]]
            same = ("annotator", "pair_id", "question", "seed", "prompt", "arm_a", "arm_b")
            assert [v[k] for k in same] == [before[k] for k in same] and v["left_is_a"] != before["left_is_a"]
    kinds = Counter(v["kind"] for v in votes)
    assert kinds["gold"] > 0 and kinds["repeat"] > 0


def test_balance_survives_dropouts_and_withdrawals(planned: Planned) -> None:
    clock = Clock()
    study = planned(annotators=6, clock=clock)
    rng = random.Random(1)
    lost = [ballots.enrol(study) for _ in range(12)]
    everybody(study, lost, rng, stop=0.1)
    for who in lost[:4]:
        ballots.withdraw(study, who)
    clock.at += 3600  # leases of those who left run out
    everybody(study, [ballots.enrol(study) for _ in range(14)], rng)
    votes = store.votes(study.engine)
    state = ballots.progress(study)["questions"]
    assert all(q["answered"] == q["wanted"] for q in state.values()), state
    assert set(balance(votes)) == {0}
    assert max(Counter((v["annotator"], v["pair_id"], v["question"]) for v in votes if v["kind"] == "normal").values()) == 1


def test_a_leased_pair_is_nobody_elses_until_the_lease_runs_out(planned: Planned) -> None:
    clock = Clock()
    study = planned(clock=clock, arms=2, gold=0, repeat=0, overlap=0, lease_minutes=30)
    people = [ready(study) for _ in range(6)]
    with store.reading(study.engine) as connection:
        held = connection.execute(sql.select(t.assignment.c.annotator).where(t.assignment.c.annotator.is_not(None))).all()
    assert Counter(row.annotator for row in held) == {who: 2 for who, _ in people}  # the pair at hand, and the next
    who, now = people[0]
    clock.at += 29 * 60
    assert ballots.now(study, who).shown == now.shown  # looking renews the lease
    clock.at += 29 * 60
    late, shown = people[1]
    for _ in range(40):
        newcomer, seen = ready(study)
        while seen.shown and seen.stage == "pair" and seen.shown.assignment != shown.shown.assignment:  # type: ignore[union-attr]
            seen = ballots.vote(study, newcomer, seen.shown.assignment, "tie", seen.seq)
        if seen.shown and seen.shown.assignment == shown.shown.assignment:  # type: ignore[union-attr]
            break
    else:
        pytest.fail("a pair whose lease ran out was never given to somebody else")
    assert ballots.now(study, who).shown == now.shown
    with pytest.raises(Turned, match="somebody else") as refused:
        ballots.vote(study, late, shown.shown.assignment, "left", shown.seq)  # type: ignore[union-attr]
    assert refused.value.status == 409
    with store.reading(study.engine) as connection:
        kept = connection.execute(sql.select(t.event.c.payload).where(t.event.c.kind == "late")).scalars().all()
    assert [json.loads(k)["side"] for k in kept] == ["left"]  # refused, and not lost
    after = ballots.now(study, late)
    assert after.shown is None or after.shown.assignment != shown.shown.assignment  # type: ignore[union-attr]


def test_an_answer_counts_once_however_often_it_is_sent(planned: Planned) -> None:
    study = planned(arms=2)
    who, now = ready(study)
    assert now.shown and now.seq == 1
    first = ballots.vote(study, who, now.shown.assignment, "left", 1)
    again = [ballots.vote(study, who, now.shown.assignment, side, 1) for side in ("left", "right", "left")]
    assert all(a == first for a in again)
    assert [v["choice"] for v in store.votes(study.engine)] in (["a"], ["b"])
    assert first.shown
    for assignment, seq in ((first.shown.assignment, 1), (first.shown.assignment, 3), (now.shown.assignment, 2)):
        with pytest.raises(Turned) as refused:
            ballots.vote(study, who, assignment, "left", seq)
        assert refused.value.status == 409
    assert len(store.votes(study.engine)) == 1


def test_the_side_is_turned_back_into_the_arm(planned: Planned) -> None:
    study = planned(arms=2, gold=0, repeat=0)
    who, now = ready(study)
    with store.reading(study.engine) as connection:
        images = {row.id: row.arm for row in connection.execute(sql.select(t.image.c.id, t.image.c.arm))}
    wanted = []
    for side in ("left", "right", "tie", "both_bad") * 2:
        if not now.shown:
            break
        chosen = {"left": now.shown.left, "right": now.shown.right}.get(side)
        wanted.append(side if chosen is None else "ab"[images[chosen]])
        now = ballots.vote(study, who, now.shown.assignment, side, now.seq, 700, True, "phone")
    votes = store.votes(study.engine)
    assert [v["choice"] for v in votes] == wanted and len(wanted) > 3
    assert {(v["rt_ms"], v["zoomed"], v["viewport"]) for v in votes} == {(700, True, "phone")}


def test_taking_back_is_an_event_and_the_vote_stays_as_it_was(planned: Planned) -> None:
    study = planned(arms=2)
    who, now = ready(study)
    assert now.shown and now.undo is None
    after = ballots.vote(study, who, now.shown.assignment, "left", now.seq)
    with store.reading(study.engine) as connection:
        row = connection.execute(sql.select(t.vote)).one()
    assert after.undo == row.id
    back = ballots.undo(study, who, row.id)
    assert back.shown == ahead_of(now.shown, back.shown) and back.answered == 0
    assert ballots.undo(study, who, row.id) == back  # twice is once
    assert store.votes(study.engine) == []
    done = ballots.vote(study, who, now.shown.assignment, "right", back.seq)
    with store.reading(study.engine) as connection:
        rows = connection.execute(sql.select(t.vote).order_by(t.vote.c.id)).all()
        events = connection.execute(sql.select(t.event.c.kind)).scalars().all()
    assert rows[0] == row and len(rows) == 2
    assert sorted(events) == ["begin", "consent", "undo"]
    assert [v["vote_id"] for v in store.votes(study.engine)] == [rows[1].id] == [done.undo]
    other, _ = ready(study)
    for vote_id, person in ((row.id, other), (rows[1].id, other), (9999, who)):
        with pytest.raises(Turned):
            ballots.undo(study, person, vote_id)


def ahead_of(shown: Any, like: Any) -> Any:
    """The pair shown before, with whatever comes after it now."""
    return shown._replace(ahead=like.ahead)


def test_a_repeat_points_to_the_vote_that_stands(planned: Planned) -> None:
    study = planned(arms=2, gold=0, repeat=0.3, annotators=1, overlap=0)
    who, now = ready(study)
    kinds: dict[int, Any] = {}
    while now.shown and now.stage == "pair":
        with store.reading(study.engine) as connection:
            row = connection.execute(sql.select(t.assignment).where(t.assignment.c.id == now.shown.assignment)).one()
        kinds[row.id] = row
        if now.seq == 2:  # answer the first pair again, after taking back two
            now = ballots.undo(study, who, now.undo or 0)
        now = ballots.vote(study, who, now.shown.assignment, "left", now.seq)  # type: ignore[union-attr]
    votes = {v["vote_id"]: v for v in store.votes(study.engine)}
    repeats = [v for v in votes.values() if v["kind"] == "repeat"]
    assert repeats and all(votes[v["repeat_of"]]["pair_id"] == v["pair_id"] for v in repeats)


def test_leaving_deletes_everything_and_gives_pairs_back(planned: Planned) -> None:
    study = planned(arms=2, gold=0.2, repeat=0.2)
    who = ballots.enrol(study, "PID-1", "S", "T")
    ballots.consent(study, who)
    stayed, _ = ready(study)
    for _ in range(9):
        answer(study, who)
    answer(study, stayed)
    ballots.undo(study, who, ballots.now(study, who).undo or 0)
    ballots.withdraw(study, who)
    with store.reading(study.engine) as connection:
        for table in (t.vote, t.assignment, t.event):
            assert connection.execute(sql.select(table).where(table.c.annotator == who)).all() == []
        row = connection.execute(sql.select(t.annotator).where(t.annotator.c.id == who)).one()
        text = " ".join(map(str, row))
    assert "PID-1" not in text and row.status == "withdrawn"
    assert len(store.votes(study.engine)) == 1
    assert ballots.now(study, who).stage == "withdrawn" and ballots.consent(study, who).stage == "withdrawn"
    with pytest.raises(Turned):
        ballots.vote(study, who, 1, "left", 1)
    assert ballots.enrol(study, "PID-1") != who


def test_a_days_work_has_an_end_and_goes_on_tomorrow(planned: Planned) -> None:
    clock = Clock()
    study = planned(clock=clock, arms=2, daily_cap=3)
    who, _ = ready(study)
    shown = [answer(study, who) for _ in range(3)]
    assert shown[-1].stage == "rest" and shown[-1].shown is None and shown[-1].answered == 3  # before a pair is shown
    assert shown[1].shown
    stale = ballots.undo(study, who, shown[-1].undo or 0)  # a page that was open from before, or what was taken back
    assert stale.stage == "rest"
    with pytest.raises(Turned, match="tomorrow") as refused:
        ballots.vote(study, who, shown[1].shown.assignment, "left", 4)
    assert refused.value.status == 429
    clock.at += refused.value.after
    assert answer(study, who).answered == 3  # what was taken back is given again


def test_who_is_left_with_pairs_of_others_waits_and_has_no_code(planned: Planned) -> None:
    clock = Clock()
    study = planned(clock=clock, arms=2, gold=0, repeat=0, overlap=0, annotators=1, lease_minutes=30)
    away, held = ready(study)  # leases two pairs and goes
    who, now = ready(study)
    seen = [now]
    while seen[-1].stage in ("pair", "intro"):
        seen.append(answer(study, who, now=seen[-1]))
    last = seen[-1]
    assert last.stage == "wait" and not last.code and last.answered + 2 == last.total
    assert ballots.now(study, who).stage == "wait"
    clock.at += 31 * 60
    while last.stage in ("wait", "pair", "intro"):
        last = answer(study, who)
    assert last.stage == "done" and last.code and last.answered == last.total == seen[-1].total
    assert held.shown and ballots.now(study, away).stage == "done"
    late, later = ready(study)
    assert (later.stage, later.total) == ("done", 0)


def test_two_clicks_on_joining_make_one_person(planned: Planned) -> None:
    study = planned(arms=2)
    numbers: list[Any] = []
    for k in range(8):
        gate = threading.Barrier(4)

        def click(name: str = f"p{k}", gate: threading.Barrier = gate) -> None:
            gate.wait()
            try:
                numbers.append((name, ballots.enrol(study, name)))
            except Exception as error:
                numbers.append((name, repr(error)))

        threads = [threading.Thread(target=click) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(numbers) == 32 and len(set(numbers)) == 8 and all(isinstance(n, int) for _, n in numbers), numbers


def test_both_blocks_come_one_after_the_other_each_with_its_introduction(planned: Planned) -> None:
    study = planned(arms=2, annotators=3)
    orders = set()
    for _ in range(4):
        who = ballots.enrol(study)
        assert ballots.now(study, who).stage == "consent"
        seen = [ballots.consent(study, who)]
        while seen[-1].stage != "done":
            seen.append(answer(study, who))
        runs = [n for i, n in enumerate(seen) if not i or n.question != seen[i - 1].question]
        orders.add(tuple(r.question for r in runs if r.question))
        assert [n.answered for n in seen] == sorted(n.answered for n in seen)
        hidden = {n.question: not n.shown.prompt for n in seen if n.shown}
        assert hidden.get("quality", True) and not hidden.get("adherence", False)
        assert seen[-1].code == links.completion_code(study.secret, ballots.people(study)[who - 1]["code"])
    assert {o[0] for o in orders} == {"quality", "adherence"}


def test_many_at_once_take_every_slot_once(planned: Planned) -> None:
    study = planned(arms=3, annotators=4, gold=0.1, repeat=0.1)
    people = [ballots.enrol(study) for _ in range(6)]
    failures: list[BaseException] = []

    def work(who: int) -> None:
        try:
            now = ballots.consent(study, who)
            while now.stage != "done":
                now = answer(study, who, "tie", None if now.stage == "wait" else now)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    votes = store.votes(study.engine)
    with store.reading(study.engine) as connection:
        done = connection.execute(sql.select(t.assignment.c.id).where(t.assignment.c.done)).all()
    assert len(votes) == len(done) == len({v["vote_id"] for v in votes})
    pairs = Counter((v["annotator"], v["question"], v["pair_id"]) for v in votes if v["kind"] == "normal")
    assert set(pairs.values()) == {1}
    everybody(study, [ballots.enrol(study) for _ in range(4)], random.Random(0))  # what nobody was left for
    assert set(balance(store.votes(study.engine))) == {0}
