"""The tests of test_study_store again, on a real Postgres server that is started here; skipped where there is none."""

from __future__ import annotations

import dataclasses
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sql
from study_help import tiny_sets
from test_study_store import (  # noqa: F401 - collected here again
    Planned,
    test_a_finished_study_is_balanced_in_every_respect,
    test_a_leased_pair_is_nobody_elses_until_the_lease_runs_out,
    test_a_repeat_points_to_the_vote_that_stands,
    test_an_answer_counts_once_however_often_it_is_sent,
    test_balance_survives_dropouts_and_withdrawals,
    test_leaving_deletes_everything_and_gives_pairs_back,
    test_many_at_once_take_every_slot_once,
    test_taking_back_is_an_event_and_the_vote_stays_as_it_was,
    test_two_clicks_on_joining_make_one_person,
    test_who_is_left_with_pairs_of_others_waits_and_has_no_code,
)

from fewstep.study import make, store
from fewstep.study.store import Store

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
pytest.importorskip("psycopg", reason="Postgres's driver is not installed: pip install 'fewstep[postgres]'")
if not BINARIES:
    pytest.skip("Postgres's server is not installed under /usr/lib/postgresql", allow_module_level=True)


def somebody() -> dict[str, int]:
    """Postgres refuses to run as root: the user its package made, or nobody."""
    if os.geteuid():
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL, without a database's name, of a server that listens on a socket in a temporary folder and on no network."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # not pytest's: the path of a socket must be short, and its parents open
    who = somebody()
    if who:
        os.chown(folder, who["user"], who["group"])
    binaries = BINARIES[-1].parent
    run = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **who}
    running = None
    try:
        words = [binaries / "initdb", "-D", folder / "data", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"]
        made = subprocess.run(words, timeout=120, check=False, **run)  # type: ignore[call-overload]
        if made.returncode:
            pytest.skip(f"Postgres's server does not start here: {made.stderr.decode()[-200:]}")
        quick = ["-c", "fsync=off", "-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
        running = subprocess.Popen([binaries / "postgres", "-D", folder / "data", *quick], **run)  # type: ignore[call-overload]
        ready = [binaries / "pg_isready", "-h", folder, "-t", "1"]
        for _ in range(60):
            if subprocess.run(ready, stdout=subprocess.DEVNULL, check=False).returncode == 0:
                break
        yield f"postgresql://tester@/NAME?host={folder}"
    finally:
        if running is not None:
            running.terminate()
            running.wait(30)
            running.stderr.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty database of its own."""
    name = f"t{abs(hash(request.node.name)) % 10**9}"
    engine = sql.create_engine(server.replace("postgresql://", "postgresql+psycopg://").replace("NAME", "postgres"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    yield server.replace("NAME", name)


@pytest.fixture
def planned(tmp_path: Path, database: str) -> Iterator[Planned]:
    """A function that plans a study on Postgres."""
    opened: list[Store] = []

    def plan(clock: Callable[[], float] | None = None, arms: int = 4, **wishes: object) -> Store:
        sets = tiny_sets(tmp_path / "sets", arms)
        make.make(sets, tmp_path / "study", make.Wish(**wishes), database)  # type: ignore[arg-type]
        study = store.open_study(tmp_path / "study", database)
        opened.append(study)
        return dataclasses.replace(study, clock=clock) if clock else study

    yield plan
    for study in opened:
        study.engine.dispose()


def test_the_folder_holds_no_database_and_says_where_to_look(planned: Planned, tmp_path: Path, database: str) -> None:
    study = planned()
    assert not (tmp_path / "study" / "study.sqlite").exists()
    assert "tester" not in (tmp_path / "study" / "protocol.json").read_text()
    with pytest.raises(ValueError, match="holds no study"):
        store.open_study(tmp_path / "study")
    with pytest.raises(ValueError, match="holds a study already"):
        make.make([tmp_path / "sets" / "arm0", tmp_path / "sets" / "arm1"], tmp_path / "other", make.Wish(), database)
    assert not list(tmp_path.glob("other*"))
    record = store.study_record(study.engine)
    assert record["title"] == "Which image is better?" and store.votes(study.engine) == []
