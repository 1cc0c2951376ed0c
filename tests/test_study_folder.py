"""A study's folder: images that say nothing, files that keep nothing deleted, and what is no study or does not fit."""

from __future__ import annotations

import json
import math
import random
import sqlite3
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from study_help import answer, everybody, ready, tiny_sets, tiny_study

from fewstep.evaluate import image_sets
from fewstep.study import ballots, database, make, server, store


def stored(study: store.Store) -> bytes:
    return b"".join(p.read_bytes() for p in study.folder.iterdir() if p.is_file())


def test_what_was_deleted_is_in_no_file_and_a_copied_file_has_every_vote(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, arms=2)
    who = ballots.enrol(study, "SECRETPID777", "STUDY888", "SESSION999")
    ballots.consent(study, who)
    for _ in range(4):
        answer(study, who)

    assert b"SECRETPID777" in stored(study)
    ballots.withdraw(study, who)
    for text in (b"SECRETPID777", b"STUDY888", b"SESSION999"):
        assert text not in stored(study)
    other, _ = ready(study)
    answer(study, other)
    database.fold(study.engine)
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes((study.folder / store.DATABASE).read_bytes())
    assert len(store.votes(database.connect(database.sqlite_url(copy)))) == 1


def test_another_program_that_reads_delays_nobody_and_deleted_is_deleted_when_it_ends(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, arms=2)
    who = ballots.enrol(study, "SECRETPID777", "STUDY888", "SESSION999")
    ballots.consent(study, who)
    reader = sqlite3.connect(study.folder / store.DATABASE)  # a report, a backup
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM vote").fetchone()
    begun = time.monotonic()
    ballots.withdraw(study, who)
    other, _ = ready(study)
    ballots.tidy(study)
    assert time.monotonic() - begun < 10 and study.owed.is_set()

    assert b"SECRETPID777" in stored(study)
    reader.close()
    client = TestClient(server.app(study))
    assert client.get("/health").status_code == 200 and not study.owed.is_set()  # whatever is asked next
    assert b"SECRETPID777" not in stored(study)
    study.owed.set()
    assert client.get(ballots.personal_links(study, 1, "http://testserver", 1.0)[0]).status_code == 200
    assert not study.owed.is_set()
    with study.engine.connect() as connection:  # a statement waits as long as ever
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == database.BUSY_MS
    assert ballots.now(study, other).stage == "pair"


def test_an_export_comes_back_as_it_was_and_is_not_served(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, annotators=3, gold=0.1, repeat=0.1)
    everybody(study, [ballots.enrol(study) for _ in range(2)], random.Random(0))
    record, votes = store.study_record(study.engine), store.votes(study.engine)
    record, votes = json.loads(json.dumps([record, votes]))
    engine = database.connect(database.sqlite_url(tmp_path / "again ?&.sqlite"))
    store.restore(engine, record, votes)
    assert store.votes(engine) == votes and store.study_record(engine) == record
    with pytest.raises(ValueError, match="holds a study already"):
        store.restore(engine, record, votes)

    broken: list[tuple[str, Any]] = [
        ("choice", "c"), ("kind", "other"), ("vote_id", "1"), ("zoomed", 1), ("pair_id", 10**6), ("arm_a", "x"),
        ("rt_ms", True),
    ]  # fmt: skip
    for key, value in broken:
        other = database.connect("sqlite://")
        with pytest.raises(ValueError, match="vote 0 of the export"):
            store.restore(other, record, [{**votes[0], key: value}])
    with pytest.raises(ValueError, match="hash"):
        store.restore(engine, {**record, "protocol": {**record["protocol"], "daily_cap": 1}}, votes)
    with pytest.raises(ValueError, match="one vote_id"):
        store.restore(engine, record, [votes[0], votes[0]])
    for change in ({"image_a": "/etc/private"}, {"image_b": "../secret"}, {"image_a": 7}):
        pairs = [{**record["pairs"][0], **change}, *record["pairs"][1:]]
        with pytest.raises(ValueError, match="the id of no image"):
            store.restore(database.connect("sqlite://"), {**record, "pairs": pairs}, votes)
    named = [{**i, "id": "../" + i["id"]} for i in record["images"]]
    with pytest.raises(ValueError, match="the id of no image"):
        store.restore(database.connect("sqlite://"), {**record, "images": named}, votes)
    huge = [{**i, "prompt": 2**70} for i in record["images"]]
    with pytest.raises(ValueError, match="refused the study"):
        store.restore(database.connect("sqlite://"), {**record, "images": huge}, votes)
    with pytest.raises(ValueError, match="lists no pairs"):
        store.restore(database.connect("sqlite://"), {**record, "pairs": None}, votes)
    restored = store.Store(engine, tmp_path, b"", record["protocol"])
    with pytest.raises(ValueError, match=r"secret\.key"):
        server.app(restored)


def test_images_say_nothing_of_where_they_come_from(tmp_path: Path) -> None:
    sets = tiny_sets(tmp_path / "sets", 2)
    larger = image_sets.read(sets[1])
    for prompt, seed in larger.benchmark.images:  # one arm has images of twice the size, with metadata
        path = sets[1] / image_sets.file_name(prompt, seed)
        Image.open(path).resize((32, 32)).save(path, dpi=(72, 72), comment=b"student")
    make.make(sets, tmp_path / "study", make.Wish())
    study = store.open_study(tmp_path / "study")
    record = store.study_record(study.engine)
    files = sorted((tmp_path / "study" / "images").iterdir())
    assert {f.stem for f in files} == {i["id"] for i in record["images"]}
    for file in files:
        with Image.open(file) as opened:
            assert opened.size == (32, 32) and not opened.info
        chunks = file.read_bytes()
        assert b"tEXt" not in chunks and b"pHYs" not in chunks and b"eXIf" not in chunks
    assert stat.S_IMODE((tmp_path / "study" / "secret.key").stat().st_mode) == 0o600
    assert json.loads((tmp_path / "study" / "protocol.json").read_text())["hash"] == record["hash"]
    names = {f.stem for f in files}
    make.make(sets, tmp_path / "twin", make.Wish())
    assert not names & {f.stem for f in (tmp_path / "twin" / "images").iterdir()}  # the secret is in the name
    assert not list(tmp_path.glob("*.partial"))


def test_sets_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    sets = tiny_sets(tmp_path / "sets", 2)
    out = tmp_path / "study"
    with pytest.raises(ValueError, match="two arms or more"):
        make.make(sets[:1], out, make.Wish())
    with pytest.raises(ValueError, match="two arms are called"):
        make.make([sets[0], sets[0]], out, make.Wish())
    with pytest.raises(ValueError, match="--per-pair"):
        make.make(sets, out, make.Wish(per_pair=99))
    with pytest.raises(ValueError, match="--gold"):
        make.make(sets, out, make.Wish(gold=0.9))
    with pytest.raises(ValueError, match=r"--annotators 1: .* judged by 3 people"):
        make.make(sets, out, make.Wish(annotators=1))
    for wish in ({"lease_minutes": math.nan}, {"lease_minutes": math.inf}, {"daily_cap": 0}):
        with pytest.raises(ValueError, match="--lease-minutes must be"):
            make.Wish(**wish)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refused the study"):
        make.make(sets, out, make.Wish(), "postgresql://127.0.0.1:1/none")
    path = sets[1] / image_sets.file_name(0, 0)
    Image.open(path).resize((32, 16)).save(path)
    with pytest.raises(ValueError, match="shapes must agree"):
        make.make(sets, out, make.Wish())
    assert not out.exists()
    Image.open(path).resize((16, 16)).save(path)
    make.make(sets, out, make.Wish())
    with pytest.raises(ValueError, match="is there already"):
        make.make(sets, out, make.Wish())
    (tmp_path / "next.partial").mkdir()
    (tmp_path / "next.partial" / "mine.txt").write_text("keep")
    make.make(sets, tmp_path / "next", make.Wish())
    assert (tmp_path / "next.partial" / "mine.txt").read_text() == "keep"
    assert {p.name for p in tmp_path.iterdir()} == {"sets", "study", "next", "next.partial"}


def test_a_database_is_that_of_its_folder_and_a_secret_must_be_readable(tmp_path: Path) -> None:
    study, other = tiny_study(tmp_path / "one", arms=2), tiny_study(tmp_path / "two", arms=2, title="Another")
    with pytest.raises(ValueError, match="another study's"):
        store.open_study(study.folder, f"sqlite:///{other.folder / store.DATABASE}")
    (study.folder / store.SECRET).write_text("no secret")
    with pytest.raises(ValueError, match="cannot be read"):
        store.open_study(study.folder)


def test_what_is_no_study_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no study"):
        store.open_study(tmp_path)
    (tmp_path / "study.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 40)
    with pytest.raises(ValueError, match="cannot be read"):
        store.open_study(tmp_path)
    for url in ("mysql://root@localhost/x", "no url", "oracle://x"):
        with pytest.raises(ValueError, match="URL|Postgres"):
            database.connect(url)
    with pytest.raises(ValueError) as refused:
        store.open_study(tmp_path, "postgresql://user:hush@127.0.0.1:1/none")
    assert "hush" not in str(refused.value)


def test_golden_pairs_have_an_objective_answer(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, gold=0.1)
    record = store.study_record(study.engine)
    images = {i["id"]: i for i in record["images"]}
    gold = [p for p in record["pairs"] if p["gold_answer"]]
    assert {p["question"] for p in gold} == {"quality", "adherence"}
    texts = {p["prompt"]: p["text"] for p in record["prompts"]}
    for pair in gold:
        right, wrong = images[pair["image_a"]], images[pair["image_b"]]
        assert pair["gold_answer"] == "a" and right["prompt"] == pair["prompt"] and not right["degraded"]
        if pair["question"] == "quality":
            assert wrong["degraded"] and wrong["prompt"] == right["prompt"]
        else:
            assert texts[wrong["prompt"]] != texts[right["prompt"]]


def test_a_degraded_image_is_plainly_worse() -> None:
    y, x = np.mgrid[0:64, 0:64]
    sharp = np.stack([255 * ((x // 4 + y // 4) % 2)] * 3, -1).astype(np.uint8)
    worse = make.degrade(sharp, 0).astype(float)
    assert worse.shape == sharp.shape
    assert np.corrcoef(worse.ravel(), sharp.ravel())[0, 1] < 0.2  # the pattern is gone
    assert np.array_equal(make.degrade(sharp, 0), make.degrade(sharp, 0))
