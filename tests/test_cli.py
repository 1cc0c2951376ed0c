"""The command: what a user can get wrong ends in one line and exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from tiny import Call, tiny_pipe, tiny_recipe

from fewstep.data import shards
from fewstep.engine import artifact
from fewstep.engine.config import from_dict, override, to_dict
from fewstep.recipes import RECIPES, budget, teacher
from fewstep.recipes.pipeline import build
from fewstep.worlds.shapes import STUDENT_4, TEACHER

TINY = {
    "distribution.adversary.heads": 2,
    "split.images": 24,
    "merge.per_task": 1,
    "merge.seeds": 1,
    "trajectory.images": "8",
    "trajectory.batch": "4",
    "trajectory.trajectories": "4",
    "distribution.images": "4",
    "distribution.batch": "4",
    "evaluate.per_task": "1",
    "evaluate.seeds": "1",
}


def tiny(teacher: Path) -> list[str]:
    settings = {"teacher": str(teacher), **TINY}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


PROGRESS = ("trajectory ", "teacher traj", "distribution ", "held-out ", "images for ")  # what a run says while it goes well


def refused(call: Call, *words: object) -> str:
    """The one line of a refused command."""
    code, _, errors = call(*words)
    lines = [line for line in errors.splitlines() if not line.startswith(PROGRESS)]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("fewstep: "), errors
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "shapes_4stp"], "unknown recipe 'shapes_4stp'; did you mean 'shapes_4step'?"),
        (["plan", "zzz"], "unknown recipe 'zzz'; one of shapes_4step"),
        (["run", "shapes_4step", "--stage", "distil"], "unknown stage 'distil' of shapes_4step; one of trajectory"),
        (["run", "shapes_4step", "--set", "distribution.ste=3"], "unknown key 'distribution.ste'; "),
        (["run", "shapes_4step", "--set", "distribution.batch=many"], "distribution.batch = 'many': expected a whole"),
        (["run", "shapes_4step", "--set", "grid=[1"], "--set 'grid=[1': while parsing"),
        (["run", "shapes_4step", "--set", "trajectory.images=0"], "trajectory.images = 0: a budget of zero"),
        (["run", "shapes_4step", "--set", "distribution.images=0"], "distribution.images = 0: a budget of zero"),
        (["run", "shapes_4step", "--config", "none.yaml"], "none.yaml does not exist"),
        (["run", "shapes_4step", "--set", "teacher=none"], "none does not exist; stage `teacher` makes it"),
        (["run", "shapes_4step", "--set", "teacher=."], ". is not a fewstep artefact"),
        (["demo", "--minutes", "0"], "--minutes 0: give a positive number of minutes"),
        (["demo", "--minutes", "-1"], "--minutes -1: give a positive number"),
        (["demo", "--minutes", "nan"], "--minutes nan: give a positive number"),
        (["demo", "--minutes", "inf"], "--minutes inf: give a positive number"),
        (["show", "none"], "none does not exist"),
        (["show", "."], ". is not a fewstep artefact"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(call: Call, tmp_path: Path, words: list[str], message: str) -> None:
    assert refused(call, *words).startswith(f"fewstep: {message}")
    assert not list(tmp_path.iterdir())


def test_a_file_of_prompts_that_is_not_there(call: Call, tmp_path: Path, teacher_folder: Path) -> None:
    line = refused(call, "run", "shapes_4step", *tiny(teacher_folder), "--set", "prompts=mine.txt")
    assert "mine.txt does not exist; `prompts` takes .txt" in line and not list(tmp_path.iterdir())


def test_a_config_names_its_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("trajectory:\n  batch: 8\n  bacth: 8\n")
    line = refused(call, "run", "shapes_4step", "--config", "c.yaml")
    assert line == "fewstep: c.yaml: unknown key 'trajectory.bacth' (line 3); did you mean 'batch'?"


def test_an_artefact_of_the_wrong_kind(call: Call, tmp_path: Path) -> None:
    record = artifact.Artifact("student", "r", (1.0, 0.0), 1.0, 12, 1)
    artifact.write(tmp_path / "s", record, lambda at: None)
    line = refused(call, "run", "shapes_4step", "--set", "teacher=s", "--out", "o")
    assert "s holds a student, a teacher is needed here; stage `teacher` makes one" in line
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_more_heads_than_blocks_are_refused_before_anything_runs(call: Call, teacher_folder: Path, tmp_path: Path) -> None:
    settings = [*tiny(teacher_folder), "--set", "distribution.adversary.heads=3"]
    line = refused(call, "run", "shapes_4step", *settings, "--out", "o")
    assert "distribution.adversary.heads = 3" in line and "the teacher has 2" in line and not (tmp_path / "o").exists()


def test_a_teacher_that_lacks_its_networks(call: Call, tmp_path: Path) -> None:
    record = artifact.Artifact("teacher", "r", (1.0, 0.0), 1.0, 12, 1)
    artifact.write(tmp_path / "t", record, lambda at: None)
    line = refused(call, "run", "shapes_4step", "--set", "teacher=t", "--out", "o")
    assert "t is not a model: transformer/config.json is missing" in line and not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["run", "demo"])
def test_a_folder_that_cannot_be_written(
    call: Call, tmp_path: Path, teacher_folder: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    if command == "demo":
        monkeypatch.setattr(teacher, "TEACHER", teacher_folder)
        monkeypatch.setattr(budget, "measure", lambda *_: budget.Speed(1e3, 1e3, 1e3))
        monkeypatch.setattr(budget, "fit", lambda *_: tiny_recipe(Path("bundled"), 4))
        words = ["demo", "--out", "file/run"]
    else:
        words = ["run", "shapes_4step", *tiny(teacher_folder), "--out", "file/run"]
    assert "Not a directory" in refused(call, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def full_safetensors(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [full, full_safetensors])
def test_a_full_disk_and_then_room_again(
    call: Call, tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    words = ["run", "shapes_2step", *tiny(teacher_folder), "--stage", "trajectory", "--out", "o"]
    with monkeypatch.context() as patch:
        patch.setattr(shards.TarWriter, "write", error)
        assert "No space left on device" in refused(call, *words)
    assert not list((tmp_path / "o" / "trajectories").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "state_dict", error)  # what every model is saved by
        assert "No space left on device" in refused(call, *words)
    assert not list((tmp_path / "o").glob("02*"))
    assert call(*words)[0] == 0
    assert artifact.read(tmp_path / "o" / "02-trajectory").kind == "student_trajectory"


def test_a_full_disk_really(tmp_path: Path) -> None:
    """What the library raises where a file cannot be written is what the command catches."""
    with pytest.raises((OSError, SafetensorError)):
        safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "missing" / "x.safetensors")


def test_changed_settings_in_a_begun_folder(call: Call, tmp_path: Path, teacher_folder: Path) -> None:
    words = ["run", "shapes_2step", *tiny(teacher_folder), "--stage", "trajectory", "--out", "o"]
    assert call(*words)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "o").rglob("*") if p.is_file()}
    line = refused(call, *words, "--set", "distribution.trajectory_weight=0.1")
    assert "o was begun with distribution.trajectory_weight = 0.05, now it is 0.1" in line
    assert "02-trajectory" in str(sorted(before)) and before == {p: p.read_bytes() for p in before}
    line = refused(call, "run", "shapes_2step", *tiny(teacher_folder), "--stage", "evaluate", "--out", "o")
    assert "05-merge does not exist; stage `merge` makes it" in line


def test_a_loss_that_is_not_finite(call: Call, tmp_path: Path, teacher_folder: Path) -> None:
    words = [*tiny(teacher_folder), "--set", "trajectory.optim.lr=1e30", "--out", "o"]
    assert "is not finite after" in refused(call, "run", "shapes_2step", *words)
    assert not (tmp_path / "o" / "02-trajectory").exists()


def test_debug_shows_the_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown recipe"):
        call("run", "zzz")


def test_an_interrupt_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.recipes.demo.resolve", stopped)
    code, _, errors = call("run", "shapes_4step")
    assert code == 130 and errors == "fewstep: stopped; the same command goes on from the last checkpoint\n"


def test_drawing_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    """Nor does it look for garbage among the libraries: a process of its own, because this one has them already."""
    script = (
        "import gc, sys, fewstep.cli\n"
        "fewstep.cli.main()\n"
        "unused = {'onnxruntime', 'openvino', 'matplotlib', 'pandas', 'sklearn', 'pyarrow', 'webdataset', 'fastapi'}\n"
        "assert not unused & set(sys.modules), unused & set(sys.modules)\n"
        "assert gc.isenabled() and gc.get_freeze_count() > len(gc.get_objects())\n"
    )
    words = ["generate", "a red circle", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len(list(tmp_path.rglob("*.png"))) == 1, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["demo", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys, fewstep.cli\n"
        "try:\n    fewstep.cli.main()\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "shapes_4step" in done.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_prints_settings_that_can_be_fed_back(call: Call, tmp_path: Path, recipe: str) -> None:
    code, out, _ = call("run", recipe, "--dry-run", "--set", "evaluate.seeds=3")
    assert code == 0 and "\nstages: " in out
    printed = yaml.safe_load(out.split("\nstages: ")[0])
    wanted = build(recipe)
    wanted = dataclasses.replace(wanted, evaluate=dataclasses.replace(wanted.evaluate, seeds=3))
    assert from_dict(build(recipe), printed) == wanted
    (tmp_path / "c.yaml").write_text(out.split("\nstages: ")[0])
    assert call("run", recipe, "--dry-run", "--config", "c.yaml")[1] == out
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_plan_says_how_long(call: Call, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "measure", lambda *_: budget.Speed(1000.0, 500.0, 200.0))
    code, out, _ = call("plan", "shapes_4step", *tiny(teacher_folder))
    assert code == 0 and "estimated on this machine" in out and out.rstrip().splitlines()[-1].startswith("in all")


def test_show_recipes_artefacts_and_runs(call: Call, tmp_path: Path, teacher_folder: Path) -> None:
    code, out, _ = call("show")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[: len(RECIPES)]] == list(RECIPES)
    assert all(str(folder) in out for folder in (TEACHER, STUDENT_4))
    code, out, _ = call("show", teacher_folder)
    shown = yaml.safe_load(out)
    assert code == 0 and shown["kind"] == "teacher" and shown["weights"] == artifact.read(teacher_folder).weights
    assert call("run", "shapes_2step", *tiny(teacher_folder), "--out", "o")[0] == 0
    code, out, _ = call("show", "o")
    said = ("03-distribution: student_distribution, whole", "05-merge: student, whole", "student_2 ", "o/report.html")
    assert code == 0 and all(text in out for text in said)


def test_the_demo_fits_itself_into_minutes_and_goes_on_as_it_was_begun(
    call: Call, tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "TEACHER", teacher_folder)
    monkeypatch.setattr(budget, "measure", lambda *_: budget.Speed(1.0, 1.0, 1.0))  # so slow that all is least
    fit = budget.fit

    def tiny_fit(pipeline: Any, speed: Any, minutes: float) -> Any:
        fitted, small = fit(pipeline, speed, minutes), tiny_recipe(Path("bundled"), 2)
        assert fitted.trajectory.trajectories == 64 and fitted.evaluate.per_task == 2
        return dataclasses.replace(
            fitted, trajectory=small.trajectory, distribution=small.distribution, evaluate=small.evaluate
        )

    monkeypatch.setattr(budget, "fit", tiny_fit)
    code, out, _ = call("demo", "--minutes", "1", "--recipe", "shapes_2step")
    assert code == 0 and "strict overall" in out and "student_2" in out and (tmp_path / "runs/demo_2step/report.html").exists()
    code, again, _ = call("demo", "--minutes", "5", "--recipe", "shapes_2step")
    assert code == 0 and again.startswith("going on with runs/demo_2step as it was begun")
    assert again.split("\n", 1)[1] == out.split("\n", 1)[1]
    line = refused(call, "demo", "--out", "runs/demo_2step")
    assert "was begun with name = 'shapes_2step', now it is 'shapes_4step'" in line


def test_budgets_fill_the_minutes_and_grow_with_them(teacher_folder: Path) -> None:
    pipeline, speed = build("shapes_4step"), budget.Speed(2000.0, 500.0, 300.0)
    spent = {}
    for minutes in (5.0, 15.0):
        fitted = budget.fit(pipeline, speed, minutes)  # type: ignore[arg-type]
        spent[minutes] = sum(budget.seconds(fitted, speed).values())
        assert 0.5 * 60 * minutes < spent[minutes] < 60 * minutes
        assert fitted.trajectory.images % fitted.trajectory.batch == 0
        assert to_dict(fitted)["grid"] == to_dict(pipeline)["grid"]


def test_rates_are_kept_and_tell_the_time_of_other_plans(call: Call, teacher_folder: Path, tmp_path: Path) -> None:
    recipe, file = tiny_recipe(teacher_folder, 4), tmp_path / "rates" / "here.json"
    measured = budget.measure(tiny_pipe(), recipe, 12, seconds=0.01)
    assert min(measured.forward, measured.train, measured.decode) > 0 and "CPU" in measured.where
    budget.write(file, measured)
    assert budget.read(file, recipe) == measured
    with pytest.raises(ValueError, match="was measured for .* this is .*lora"):
        budget.read(file, override(recipe, ["roles.trained=lora"]))
    settings = [f"teacher={teacher_folder}", "distribution.adversary.heads=2", "resolution=64", "prompts=shapes"]
    words = ["plan", "sd35_medium_4step_frugal", *(word for s in settings for word in ("--set", s))]
    budget.write(file, budget.Speed(1.0, 0.5, 1.0, "a GPU"))
    hours = {}
    for count in (1, 2):
        code, out, _ = call(*words, "--gpus", f"{count}x24", "--calibration", str(file))
        told = dict(line.split() for line in out.partition("estimated on ")[2].splitlines()[1:9] if "in all" not in line)
        assert code == 0 and ("estimated on 2 x a GPU" if count == 2 else "estimated on a GPU") in out
        hours[count] = {part: sum(60**k * int(n) for k, n in enumerate(reversed(t.split(":")))) for part, t in told.items()}
    assert hours[1]["trajectory"] == 24_000 / 0.5 == 2 * hours[2]["trajectory"]  # images over images a second
    assert hours[1]["merge"] == hours[2]["merge"]  # which one process does
    file.write_text('{"forward": 0, "train": 1, "decode": 1}')
    for wrong, message in ((file, "a rate is not positive"), (tmp_path / "no.json", "does not exist")):
        line = refused(call, *words, "--calibration", str(wrong))
        assert message in line and "--calibrate" in line


def test_a_plan_measures_this_machine_when_told_to(call: Call, teacher_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    code, out, _ = call("plan", "shapes_4step", *tiny(teacher_folder), "--calibrate", str(file))
    assert code == 0 and f"are kept in {file}" in out and "estimated on a CPU" in out
    assert budget.read(file, tiny_recipe(teacher_folder, 4)).where.startswith("a CPU")
    assert "give one of --calibrate" in refused(call, "plan", "shapes_4step", "--calibrate", "a", "--calibration", "b")
