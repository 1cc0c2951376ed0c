"""`fewstep serve` as a command in a process of its own, what it gives to its workers, and what it cannot serve."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import tyro
from serving import pixels64

from fewstep.commands import serve as command
from fewstep.engine import artifact
from fewstep.serve.contract import Ask
from fewstep.serve.workers import Process, Spec
from fewstep.worlds.shapes import STUDENT_4


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_draws_keeps_conditions_and_ends_cleanly(tmp_path: Path, ending: signal.Signals) -> None:
    from fewstep.serve.engine import open_engine

    cache = tmp_path / "cache"
    words = ["--port", "0", "--cache", str(cache), "--dtype", "float32", "--device", "cpu"]
    places = os.pathsep.join(place for place in sys.path if place)
    started = subprocess.Popen(
        [sys.executable, "-c", "from fewstep.cli import main; main()", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        told = re.match(r"(http://127\.0\.0\.1:[0-9]+) ", line)
        assert told is not None, line + started.communicate(timeout=10)[1]
        (worker,) = psutil.Process(started.pid).children()
        worker.send_signal(ending)  # as when the whole group is told: the server lets its worker finish first
        body = {"prompt": "a large red circle", "seed": 11}
        answer = httpx.post(f"{told[1]}/v1/images/generations", json=body, timeout=60).json()
        own = open_engine(STUDENT_4).draw([Ask("a large red circle", seed=11)])[0].image
        assert np.abs(pixels64(answer["data"][0]["b64_json"]).astype(int) - own).max() <= 1
        assert any(path.is_file() for path in cache.rglob("*")), "--cache reaches the worker"
        example = httpx.get(f"{told[1]}/docs").text
        assert f"{told[1]}/v1/images/generations" in example
        started.send_signal(ending)
        out, err = started.communicate(timeout=30)
    finally:
        started.kill()
        started.wait(10)
    assert started.returncode == 0 and "Traceback" not in err and err.splitlines()[-1] == "stopped", err


def test_a_folder_that_models_lack_parts_of_reaches_their_worker(tmp_path: Path) -> None:
    """It is refused in the words of the engine, which looked into it."""
    made = replace(artifact.read(STUDENT_4), kind="export", format="gguf", parents={"student": "f" * 64})
    artifact.write(tmp_path / "x", made, lambda folder: (folder / "student.gguf").write_bytes(b""))
    hand = Process(Spec(str(tmp_path / "x"), {"base": str(STUDENT_4)}))

    async def opened() -> None:
        try:
            await hand.start()
        finally:
            await hand.close()

    with pytest.raises(ValueError, match="is not the student that"):
        asyncio.run(opened())


def test_every_argument_that_is_a_path_reaches_the_opener_as_one() -> None:
    given = {"cache": "/a", "teacher": "/b", "base": "/c", "dtype": "float32"}
    hand = Process(Spec("paths", given, "serving:open_painter"))

    async def opened() -> str:
        try:
            return (await hand.start()).name
        finally:
            await hand.close()

    assert asyncio.run(opened()) == "base=Path cache=Path dtype=str teacher=Path"


def test_it_ends_cleanly_while_models_are_opened() -> None:
    places = os.pathsep.join(place for place in sys.path if place)
    code = "from fewstep.cli import main; main()"
    words = [sys.executable, "-c", code, "serve", "--port", "0"]
    started = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": places})
    try:
        assert started.stderr is not None and started.stderr.readline().startswith("opening")
        started.send_signal(signal.SIGTERM)
        _, err = started.communicate(timeout=30)
    finally:
        started.kill()
        started.wait(10)
    assert started.returncode == 0 and "Traceback" not in err and err.splitlines()[-1] == "stopped", err


def test_threads_leave_the_server_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [command._threads(workers) for workers in (1, 2, 3, 20)] == [8, 3, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert command._threads(1) == 0, "what the environment says holds"


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=1e-3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert command._named(["lr=1e-3"]) == {"lr=1e-3": "lr=1e-3"}
    assert command._named(["mine=lr=1e-3"]) == {"mine": "lr=1e-3"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a=bundled", "a=teacher"], "two models are called 'a'"),
        (["=x"], "give DIR or NAME=DIR"),
        (["a/b=x"], "give DIR or NAME=DIR"),
        (["--port", "70000"], "0 to 65535"),
        (["--workers", "0"], "1 or more"),
        (["--queue", "4"], "never fit"),
        (["--api-key", "a", "--api-key-file", "b"], "not both"),
        (["--api-key-file", "nothing-there"], "cannot be read"),
        (["nothing-there", "--port", "0"], "does not exist"),
        (["--host", "203.0.113.7", "--api-key", "k"], "give another --port or --host"),
        (["--device", "cpu,"], "missing between the commas"),
        (["--threads", "-1"], "threads = -1"),
        (["--queue", "4"], "--max-n 4"),
        (["--timeout", "nan"], "timeout_s = nan"),
        (["--batch-wait-ms", "inf"], "batch_wait_ms = inf"),
    ],
)
def test_the_command_says_what_cannot_be_served(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tyro.cli(command.serve, args=words)


def test_the_command_names_models_by_their_folders(tmp_path: Path) -> None:
    folder = tmp_path / "05-merge"
    folder.mkdir()
    named = command._named(["bundled", "teacher", f"{folder}/", f"mine={folder}"])
    assert named == {"shapes-4step": "bundled", "shapes-teacher": "teacher", "05-merge": f"{folder}/", "mine": str(folder)}
    (tmp_path / "key").write_text(" secret\n")
    assert command._key("", tmp_path / "key") == "secret"
