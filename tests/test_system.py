"""Figures of a whole pipeline: they add up, they are of what was asked, and other images do not pass for the same ones."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_teacher

from fewstep.commands.tables import measure
from fewstep.engine import artifact
from fewstep.models import sd3
from fewstep.recipes import system
from fewstep.worlds.shapes import STUDENT_4

FEW = ["--runs", "3", "--steps", "2", "--guidance", "1"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """The measuring processes' work done in this one; what they were asked, in order."""
    asked: list[argparse.Namespace] = []

    def alone(words: list[str]) -> dict[str, Any]:
        asked.append(system.parsed(words))
        return json.loads(json.dumps(system.measure(asked[-1])))

    monkeypatch.setattr(system, "_alone", alone)
    return asked


def test_figures_are_of_what_was_asked(here: list[argparse.Namespace], teacher_folder: Path) -> None:
    found = system.run(str(teacher_folder), runs=3, fewest=2, steps=2, guidance=1.0, pixels=32)
    asked, record = found["settings"], artifact.read(teacher_folder)
    assert (asked["steps"], asked["nfe"], asked["width"], asked["height"]) == (2, 2, 32, 32)
    assert asked["grid"][0] == 1 and asked["grid"][-1] == 0 and len(asked["grid"]) == 3
    assert found["weights"] == record.weights and found["kind"] == "teacher" and found["runs"] == 3
    assert asked["batch"] == 1 and asked["threads"] == torch.get_num_threads() and asked["dtype"] == "float32"
    assert any("32x32" in note for note in found["notes"])  # a departure from what it was made for is said
    assert [a.runs for a in here] == [3, 0] and here[1].dtype == "float32" and here[1].model == str(teacher_folder)


def test_parts_of_the_time_do_not_exceed_the_whole(here: list[argparse.Namespace], teacher_folder: Path) -> None:
    found = system.run(str(teacher_folder), runs=4, fewest=2, steps=2)
    seconds = found["seconds"]
    assert found["settings"]["nfe"] == 4  # the teacher's own guidance doubles them
    for name in ("total", *system.PARTS):
        assert 0 < seconds[name]["p5"] <= seconds[name]["p50"] <= seconds[name]["p95"]
    assert all(seconds[part]["p50"] < seconds["total"]["p95"] for part in system.PARTS)
    assert seconds["first"] > 0 and seconds["load"] > 0
    assert found["memory_mib"]["peak"] >= found["memory_mib"]["before the model"] > 10


def test_the_model_itself_draws_the_same_images(here: list[argparse.Namespace], teacher_folder: Path) -> None:
    near = system.run(str(teacher_folder), runs=2, fewest=2, pixels=32)["guard"]
    assert near["same"] and near["psnr_median"] == 100 and near["largest"] == 0 and near["images"] == system.GUARDED
    assert near["reference"] == "itself in float32" and near["reference_nfe"] > 2


def test_fewer_steps_are_other_images_and_no_speed_up(here: list[argparse.Namespace], teacher_folder: Path) -> None:
    found = system.run(str(teacher_folder), runs=2, fewest=2, steps=1, guidance=1.0, pixels=32)
    near = found["guard"]
    assert found["settings"]["nfe"] == 1 and near["reference_nfe"] > 2 and near["psnr_median"] < 100
    assert (here[1].steps, here[1].guidance, here[1].pixels) == (None, None, 32)  # the reference is the model's own way
    assert "2 runs: fewer than 30, so that percentiles are single images" in system.show(found)


def test_other_weights_are_marked_as_different_images(
    here: list[argparse.Namespace], teacher_folder: Path, tmp_path: Path
) -> None:
    other = tiny_teacher(tmp_path / "other", seed=1)
    found = system.run(str(teacher_folder), runs=2, fewest=2, steps=1, guidance=1.0, reference=str(other))
    assert not found["guard"]["same"] and found["guard"]["psnr_median"] < 30
    assert found["guard"]["reference"].endswith("/other") and here[1].model == str(other)
    assert "DIFFERENT IMAGES" in system.show(found)
    assert "DIFFERENT" not in system.show(found | {"guard": found["guard"] | {"same": True}})


def test_prompts_of_timed_images_are_all_new(here: list[argparse.Namespace], teacher_folder: Path, monkeypatch: Any) -> None:
    """What an engine keeps by prompt must not make the timed images faster."""
    from fewstep.serve import engine

    drawn: list[tuple[str, int]] = []
    opened = engine.open_engine

    def spied(*args: Any, **more: Any) -> Any:
        made = opened(*args, **more)
        draw = made.draw
        made.draw = lambda asks: drawn.extend((a.prompt, a.index) for a in asks) or draw(asks)  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(engine, "open_engine", spied)
    system.run(str(teacher_folder), runs=3, fewest=2, steps=1, guidance=1.0)
    own, reference = drawn[: -system.GUARDED], drawn[-system.GUARDED :]
    assert len(own) == 1 + system.WARM_UP + 3 + system.GUARDED
    assert len({prompt for prompt, _ in own}) == len(own) == len({index for _, index in own})
    assert own[-system.GUARDED :] == reference  # the same images are compared


def test_an_export_is_compared_with_its_student_and_never_with_itself(tmp_path: Path) -> None:
    student = artifact.read(STUDENT_4)

    def export(of: str) -> str:
        record = replace(student, kind="export", format="onnx", parents={"student": of})
        artifact.write(tmp_path / of[:8], record, lambda at: (at / "file").write_text("x"))
        return str(tmp_path / of[:8])

    assert system.made_of(export(student.weights), None) == "bundled"
    other = export("another student")
    assert system.made_of(other, STUDENT_4) == str(STUDENT_4)
    with pytest.raises(ValueError, match="its student is not known: give it with --reference"):
        system.run(other)
    assert system.made_of("bundled", None) is None and system.made_of("teacher", None) is None


def test_the_limit_is_on_the_median_image() -> None:
    """Of five images one is another one: the median is not moved, the guard holds; of three of five it is."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (5, 8, 8, 3), dtype=np.uint8)
    one, three = images.copy(), images.copy()
    one[0] = 255 - one[0]
    three[:3] = 255 - three[:3]
    assert system.guard(one, images, 30)["same"] and not system.guard(three, images, 30)["same"]
    off = images + np.uint8(8)  # every pixel by 8: 20 log10(255 / 8) dB
    near = system.guard(off, images, 30)
    assert near["psnr_median"] == pytest.approx(20 * np.log10(255 / 8)) and near["same"]
    assert not system.guard(off, images, 30.1)["same"]


def test_disk_is_counted_by_part(tmp_path: Path) -> None:
    for name, size in {"transformer/a.bin": 3, "transformer/sub/b.bin": 1, "vae/c.bin": 2}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * size * system.MIB)
    (tmp_path / "large.gguf").write_bytes(b"0" * (system.MIB + 1))
    (tmp_path / "artifact.json").write_bytes(b"0" * 512 * 1024)
    found = system.disk(tmp_path)
    assert list(found)[:3] == ["all", "transformer", "vae"]
    assert found["transformer"] == 4 and found["other"] == 0.5 and found["all"] == pytest.approx(7.5, abs=1e-5)


def test_parameters_are_those_of_the_networks(teacher_folder: Path, tmp_path: Path) -> None:
    pipe = sd3.load(teacher_folder)
    found = system.parameters(teacher_folder)
    assert found["denoiser"] == sum(p.numel() for p in pipe.transformer.parameters())
    assert found["T5"] == sum(p.numel() for p in pipe.text_encoder_3.parameters())
    assert system.parameters(tmp_path) == {}


@pytest.mark.parametrize(
    ("model", "name"), [("bundled", "bundled"), ("/tmp/x/runs/05-merge", "runs/05-merge"), ("./a/../b", "a/b")]
)
def test_a_name_holds_no_path_of_the_machine(model: str, name: str) -> None:
    assert system._name(model) == name


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="--runs 29: a 5th and a 95th percentile need at least 30 images"):
        system.run("bundled", runs=29)
    with pytest.raises(ValueError, match="--runs 1: .* at least 2 images"):
        system.run("bundled", runs=1, fewest=1)


def test_the_command_measures_in_a_process_of_its_own(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """With a fresh process for what is timed; the reference is drawn in this one, which is quicker here."""
    monkeypatch.setattr("fewstep.commands.prepare", lambda: None)
    apart = system._alone
    monkeypatch.setattr(system, "_alone", lambda w: apart(w) if w[4] == "auto" else system.measure(system.parsed(w)))
    monkeypatch.setattr(system, "run", partial(system.run, fewest=2))
    hog = np.ones(600 * 2**20, dtype=np.uint8)  # what this process has is none of the model's
    measure("bundled", runs=2, out=tmp_path)
    found = json.loads((tmp_path / system.RECORD).read_text())
    assert found["name"] == "bundled" and found["weights"] == artifact.read(STUDENT_4).weights
    assert found["settings"]["nfe"] == 4 and found["guard"]["psnr_median"] > 60
    assert hog.sum() == len(hog)
    assert found["memory_mib"]["before the model"] < 600 + 400 and found["memory_mib"]["peak"] < 1400
    assert found["hardware"]["device"] and str(tmp_path) not in (tmp_path / system.RECORD).read_text()
    out = capsys.readouterr().out
    assert "the same images" in out and out.strip().endswith(system.RECORD)


def test_a_process_that_fails_says_why_in_one_line(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    script = tmp_path / "python"
    said = ("advice", "measuring it 50%", "ValueError: DIR does not exist")
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}' >&2\n" for line in said) + "exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(system.sys, "executable", str(script))
    with pytest.raises(ValueError, match="^nothing could not be measured: DIR does not exist$"):
        system.run("nothing")
    assert capfd.readouterr().err == "measuring it 50%\n"  # progress is passed on, advice is not
