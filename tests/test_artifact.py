"""An artefact is whole or not there, and says what it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact, exists, read, weights_hash, write

RECORD = Artifact(
    kind="student",
    recipe="r",
    grid=(1.0, 0.75, 0.0),
    guidance_scale=1.0,
    t5_tokens=12,
    images_seen=64,
    parents={"teacher": "abc"},
    metrics={"loss": 0.1},
    config={"batch": 4, "optim": {"lr": 1e-4}},
)


def model(folder: Path, value: float = 1.0) -> None:
    (folder / "transformer").mkdir()
    save_file({"w": torch.full((3,), value)}, folder / "transformer" / "w.safetensors")


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "03-distribution"
    assert not exists(folder)
    written = write(folder, RECORD, model)
    assert exists(folder) and written.weights == weights_hash(folder) and len(written.weights) == 64
    assert read(folder) == read(folder, "student") == written
    assert asdict(written) | {"weights": ""} == asdict(RECORD)
    assert [p.name for p in folder.parent.iterdir()] == ["03-distribution"]


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        write(tmp_path / name, RECORD, lambda at, value=value: model(at, value))  # type: ignore[misc]
    a, b, c = (read(tmp_path / name).weights for name in "abc")
    assert a == b != c
    (tmp_path / "b" / "transformer" / "w.safetensors").rename(tmp_path / "b" / "transformer" / "v.safetensors")
    assert weights_hash(tmp_path / "b") != a


def test_a_full_disk_leaves_nothing_and_keeps_the_older_artefact(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        model(folder, 2.0)
        raise OSError(28, "No space left on device")

    folder = tmp_path / "x"
    with pytest.raises(OSError, match="No space"):
        write(folder, RECORD, full)
    assert not list(tmp_path.iterdir())
    before = write(folder, RECORD, model)
    with pytest.raises(OSError, match="No space"):
        write(folder, RECORD, full)
    assert read(folder) == before and weights_hash(folder) == before.weights
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_is_not_read_and_is_replaced(tmp_path: Path) -> None:
    partial = tmp_path / "x.partial"
    partial.mkdir()
    (partial / "stale.safetensors").write_text("half")
    assert not exists(tmp_path / "x")
    write(tmp_path / "x", RECORD, model)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["artifact.json", "transformer"]


def test_a_folder_below_a_file_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write(tmp_path / "file" / "x", RECORD, model)


def test_a_wrong_kind_names_the_stage_that_makes_the_right_one(tmp_path: Path) -> None:
    write(tmp_path / "x", RECORD, model)
    with pytest.raises(ValueError, match=r"holds a student, a teacher is needed here; stage `teacher` makes one"):
        read(tmp_path / "x", "teacher")
    with pytest.raises(ValueError, match="--stage trajectory"):
        read(tmp_path / "x", "student_trajectory")
    with pytest.raises(ValueError, match="y does not exist; stage `merge` makes it"):
        read(tmp_path / "y", "student")
    assert set(artifact.MAKER) == set(get_args(artifact.Kind))


def test_what_is_no_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give a folder"):
        read(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"is not a fewstep artefact: artifact.json is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({**asdict(RECORD), "steps": 4}),
        json.dumps({k: v for k, v in asdict(RECORD).items() if k != "grid"}),
        json.dumps({k: v for k, v in asdict(RECORD).items() if k != "recipe"}),
    ],
)
def test_unknown_and_missing_keys_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "artifact.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged or of another version"):
        read(tmp_path)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "artifact.json").write_text(json.dumps({**asdict(RECORD), "kind": "proxy"}))
    with pytest.raises(ValueError, match="kind 'proxy' is not one of teacher, student_trajectory, student"):
        read(tmp_path)
