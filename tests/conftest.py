"""Tests run offline and give the same numbers on every machine."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Newer CPUs would compute in bfloat16 (`engine.precision`), which no exact answer survives. Read when torch is imported.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"

import pytest
import torch
from hypothesis import settings
from tiny import Call

from fewstep import cli, commands

# One thread: sums are added in one order, and the tiny networks of the tests are faster without a second.
torch.set_num_threads(1)
settings.register_profile("fewstep", deadline=None, derandomize=True)
settings.load_profile("fewstep")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails; servers of its own on this machine are fine."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        outside = not isinstance(address, tuple) or address[0] not in ("127.0.0.1", "::1", "localhost")
        if self.family in (socket.AF_INET, socket.AF_INET6) and outside:
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of kind teacher: tiny, random, and of the right classes."""
    from tiny import tiny_teacher

    return tiny_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run the command in this process, from an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "prepare", lambda: None)  # the tests have their own number of threads
    monkeypatch.delenv("FEWSTEP_DEBUG", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewstep", *map(str, words)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capfd.readouterr())

    return run
