"""The doctor: what is fine is said in one line, what is not comes with what mends it, and nothing ends the others."""

from __future__ import annotations

import importlib.metadata
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from tiny import Call

from fewstep import noise
from fewstep.engine import artifact, doctor
from fewstep.engine.doctor import Finding
from fewstep.recipes import doctor as surgery


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_what_the_package_requires_is_looked_at_but_not_what_its_tests_do() -> None:
    found = by_name(doctor.environment())
    assert {"Python", "torch", "diffusers", "pyarrow"} <= found.keys() and "pytest" not in found
    assert found["torch"] == Finding("ok", "torch", importlib.metadata.version("torch"))


def test_a_library_that_is_missing_or_old() -> None:
    missing = doctor.installed(Requirement("no-such-library>=2.0"))
    assert missing == ("FAIL", "no-such-library", "missing", "pip install 'no-such-library>=2.0'")
    extra = doctor.installed(Requirement("no-such-library>=2.0"), "data")
    assert extra == ("note", "no-such-library", "missing (extra data)", "pip install 'fewstep[data]'")
    old = doctor.installed(Requirement("numpy>=999"))
    assert old.state == "FAIL" and old.found.endswith(">=999 is needed") and old.fix == "pip install 'numpy>=999'"


def test_a_build_without_cuda_on_a_machine_with_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert by_name(doctor.accelerators())["torch build"] == Finding("ok", "torch build", "CPU")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert by_name(doctor.accelerators())["torch build"].fix.startswith("install the CUDA build")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert by_name(doctor.accelerators())["torch build"].found == "CUDA 13.0, but no GPU answers"


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    about = namedtuple("About", "name total_memory")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about(f"card {number}", 24 * doctor.GIB))
    found = by_name(doctor.accelerators())
    assert found["GPU 1"] == Finding("ok", "GPU 1", "card 1, 24 GiB")


def test_more_threads_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert by_name(doctor.accelerators())["threads"].fix.startswith("export OMP_NUM_THREADS=")


def test_room_for_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = by_name(doctor.room(tmp_path / "a" / "b"))["disk"]
    assert disk.found.endswith(f"free in {tmp_path}") and not (tmp_path / "a").exists() and not list(tmp_path.iterdir())
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(9, 9, doctor.DISK - 1))
    assert by_name(doctor.room(tmp_path))["disk"].state == "FAIL"

    def read_only(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    disk = by_name(doctor.room(tmp_path))["disk"]
    assert disk.found == f"{tmp_path} cannot be written (Permission denied)" and "--out" in disk.fix


def test_the_token_is_looked_for_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    (found,) = doctor.hub()
    assert found.state == "note" and found.fix.endswith("hf auth login")
    monkeypatch.setattr(doctor, "get_token", lambda: "hf_secret")
    (found,) = doctor.hub()
    assert found.state == "ok" and "secret" not in found.found


def test_the_noise_that_every_machine_should_make() -> None:
    """The doctor's golden value is what the mathematics gives here, too."""
    assert noise.normal((2,), seed=1, index=[2], step=3)[0].tolist() == pytest.approx(surgery.NOISE, abs=1e-3)


def test_the_bundled_teacher_draws_what_it_is_asked_for() -> None:
    assert surgery.drawn_right() >= 3


def test_damaged_weights_and_a_broken_check_are_findings_and_end_with_code_one(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[Finding]:
        raise RuntimeError("illegal\ninstruction")
        yield

    monkeypatch.setattr(doctor, "accelerators", broken)
    monkeypatch.setattr(surgery, "drawn_right", lambda: 0)
    monkeypatch.setattr(artifact, "weights_hash", lambda folder: "other")
    code, out, _ = call("doctor", "--out", tmp_path)
    assert code == 1 and out.rstrip().endswith("to mend before fewstep works here")
    assert "FAIL  accelerators    RuntimeError: illegal instruction" in out
    assert "FAIL  teacher         damaged or missing weights" in out and "FAIL  drawing" in out
    assert "ok    Python" in out and "disk" in out


def test_colours_are_for_terminals() -> None:
    finding = Finding("FAIL", "disk", "full", "free some space")
    assert doctor.say(finding, color=False) == "FAIL  disk            full\n      fix: free some space"
    assert doctor.say(finding, color=True).startswith("\033[31mFAIL")
