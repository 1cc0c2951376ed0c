"""Votes out and in again: nothing changes, whatever texts hold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study_help import TEXTS, VOTED_ARMS, held, voted_study

from fewstep.study import exchange, rows, simulate, store

NASTY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["=1+1", "+1", "-2", "@SUM(A1)", "'quoted", "'=x", "a,b", 'say "hi"', "two\nlines", "\r\n", "\t", "<script>x</script>",
     "", " ", "＝1", "\u2028", "\x00", "﻿bom", "null", "true", "1e9"]
)  # fmt: skip


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voted_study(tmp_path_factory.mktemp("study") / "voted", TEXTS)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "json", "zip"])
def test_a_study_comes_back_as_it_went(voted: Path, tmp_path: Path, kind: str) -> None:
    written = exchange.export(voted, tmp_path / f"out.{kind}")
    record, votes = held(voted)
    assert len(votes) > 30 and {v["kind"] for v in votes} == {"normal", "gold", "repeat"}
    assert exchange.import_(written, tmp_path / "again") == len(votes)
    again, back = held(tmp_path / "again")
    assert back == votes
    if kind in ("zip", "parquet"):
        assert again == record
    if kind == "zip":
        for image in record["images"]:
            name = f"{store.IMAGES}/{image['id']}.png"
            assert (tmp_path / "again" / name).read_bytes() == (voted / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    second = exchange.export(tmp_path / "again", tmp_path / f"second.{kind}")
    assert second.read_bytes() == written.read_bytes()


LINE = st.fixed_dictionaries(
    {
        "vote_id": st.integers(-(2**63) + 1, 2**63 - 1), "annotator": NASTY, "question": NASTY, "prompt": st.integers(-9, 9),
        "prompt_text": NASTY, "category": NASTY, "seed": st.integers(0, 9), "arm_a": NASTY, "arm_b": NASTY,
        "left_is_a": st.booleans(), "choice": st.sampled_from(["a", "b", "tie", "both_bad"]), "kind": NASTY,
        "gold_answer": st.none() | st.sampled_from(["a", "b"]), "repeat_of": st.none() | st.integers(0, 99),
        "pair_id": st.integers(0, 99), "rt_ms": st.none() | st.integers(0, 10**9), "zoomed": st.booleans(), "viewport": NASTY,
        "at": st.just("2026-01-05T09:00:00.000+00:00"),
    }
)  # fmt: skip


@settings(max_examples=50)
@given(st.lists(LINE, max_size=4))
def test_tables_keep_every_text(votes: list[dict[str, Any]]) -> None:
    table = [rows.row(v) for v in votes]
    for back in (
        rows.from_csv(io.StringIO(rows.to_csv(table), newline="")),
        rows.from_jsonl(io.BytesIO(rows.to_jsonl(table).encode())),
        rows.from_parquet(io.BytesIO(rows.to_parquet(table, {})))[0],
    ):
        assert [rows.vote_of(r, "x") for r in back] == votes


@given(NASTY)
def test_no_cell_of_a_csv_begins_like_a_formula(text: str) -> None:
    vote = simulate.votes(VOTED_ARMS, 2, 1, 2, checks=0, overlap=0)[0]
    written = rows.to_csv([rows.row({**vote, "prompt_text": text})])
    cell = list(csv.DictReader(io.StringIO(written, newline="")))[0]["prompt_text"]
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NASTY.filter(lambda t: "\x00" not in t))
def test_a_zip_keeps_every_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    base = tmp_path_factory.mktemp("zip")
    source = voted_study(base / "s", {0: text}, text or "x")
    exchange.export(source, base / "s.zip")
    exchange.import_(base / "s.zip", base / "t")
    assert held(base / "t") == held(source)


def test_columns_begin_as_those_of_arenas(voted: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    exchange.export(voted, tmp_path / "v.parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names[:3] == ["model_a", "model_b", "winner"]
    assert set(table["winner"].to_pylist()) <= {"model_a", "model_b", "tie", "both_bad"}


def test_exports_have_pseudonyms_and_external_ids_only_if_asked(voted: Path, tmp_path: Path) -> None:
    import sqlalchemy as sql

    opened = store.open_study(voted)
    with opened.engine.begin() as connection:
        connection.execute(sql.text("UPDATE annotator SET external_id = 'PROLIFIC' || id"))
    opened.engine.dispose()
    for kind in ("csv", "parquet", "jsonl", "json"):
        exchange.export(voted, tmp_path / f"plain.{kind}")
        assert b"PROLIFIC" not in (tmp_path / f"plain.{kind}").read_bytes()
    exchange.export(voted, tmp_path / "named.csv", external_ids=True)
    assert "PROLIFIC1" in (tmp_path / "named.csv").read_text()
    exchange.import_(tmp_path / "named.csv", tmp_path / "again")
    assert held(tmp_path / "again")[1] == held(voted)[1]
    with pytest.raises(ValueError, match="holds no external ids"):
        exchange.export(voted, tmp_path / "named.zip", external_ids=True)


def test_a_strangers_arena_can_be_analysed(tmp_path: Path) -> None:
    lines = ["model_a,model_b,winner,judge,prompt,language"]
    winners = ["model_a", "tie (bothbad)", "model_b"] * 4
    lines += [f"x,y,{w},rater{i % 3}@example.org,what is {i % 4}?,en" for i, w in enumerate(winners)]
    (tmp_path / "arena.csv").write_text("\n".join(lines))
    assert exchange.import_(tmp_path / "arena.csv", tmp_path / "s") == 12
    record, votes = held(tmp_path / "s")
    assert {v["annotator"] for v in votes} == {"p1", "p2", "p3"} and len(record["prompts"]) == 4
    assert votes[1]["choice"] == "both_bad" and votes[0]["prompt_text"] == "what is 0?" and record["title"] == "arena"


def test_judges_may_be_numbers_or_nobody(tmp_path: Path) -> None:
    lines = [{"model_a": "x", "model_b": "y", "winner": "tie", "judge": who} for who in (5, 5, 7, None)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exchange.import_(tmp_path / "a.jsonl", tmp_path / "s")
    assert [v["annotator"] for v in held(tmp_path / "s")[1]] == ["5", "5", "7", "unknown"]


def test_label_studio_sees_sides(voted: Path) -> None:
    votes = held(voted)[1]
    tasks = rows.to_label_studio(votes)
    chosen = {a["result"][0]["value"]["choices"][0] for t in tasks for a in t["annotations"]}
    assert chosen <= {"left", "right", "tie", "both_bad"} and {"left", "right"} <= chosen
    for task in tasks:
        for annotation in task["annotations"]:
            vote = next(v for v in votes if v["vote_id"] == annotation["result"][0]["meta"]["vote_id"])
            if vote["choice"] in ("a", "b"):
                left = (vote["choice"] == "a") == vote["left_is_a"]
                assert annotation["result"][0]["value"]["choices"] == ["left" if left else "right"]
    json.dumps(tasks)


def test_without_pyarrow_the_fix_is_named(voted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[data\]'"):
        exchange.export(voted, tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())
