"""Tests run offline and give the same numbers on every machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hypothesis import settings

# One thread: sums are added in one order, and the tiny networks of the tests are faster without a second.
torch.set_num_threads(1)
settings.register_profile("fewstep", deadline=None, derandomize=True)
settings.load_profile("fewstep")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of kind teacher: tiny, random, and of the right classes."""
    from tiny import tiny_teacher

    return tiny_teacher(tmp_path_factory.mktemp("tiny") / "teacher")
