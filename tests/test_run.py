"""A whole distillation, tiny: what it leaves behind, that it is done once, and that kills do not change a bit of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from killed import SHARD
from tiny import tiny_recipe

from fewstep.data import trajectories
from fewstep.engine import artifact
from fewstep.engine.config import from_dict
from fewstep.engine.log import read_metrics
from fewstep.evaluate import outcomes
from fewstep.models import sd3
from fewstep.recipes import execute
from fewstep.recipes.pipeline import build
from fewstep.worlds.shapes.grammar import TASKS

STUDENTS = {"02-trajectory": "student_trajectory", "03-distribution": "student_distribution", "05-merge": "student"}
BRANCHES = {"04-split/low": "student_low", "04-split/high": "student_high"}  # of four steps; two are not split
# Where the process is killed, in the order in which the run goes on; which call is the last.
KILLS = [
    ("trajectories", 2),
    ("checkpoint", 2),
    ("trajectory", 2),
    ("distribution", 3),
    ("checkpoint", 3),
    ("split", 6),
    ("merge", 1),
    ("evaluation", 3),
]


class Run:
    """A finished run of a recipe, uninterrupted."""

    def __init__(self, teacher: Path, out: Path, steps: int) -> None:
        self.teacher, self.out, self.steps = teacher, out, steps
        self.pipeline = tiny_recipe(teacher, steps)
        self.report = execute.run(self.pipeline, out)
        self.numbers: dict[str, Any] = json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module", params=[4, 2], ids=["shapes_4step", "shapes_2step"])
def run(request: pytest.FixtureRequest, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectories, "SHARD", SHARD)
        yield Run(teacher_folder, tmp_path_factory.mktemp("run") / "out", request.param)


def arms(steps: int) -> list[str]:
    return [
        "autoencoder_ceiling",
        "teacher_32_guided",
        f"teacher_{steps}_guided",
        f"teacher_{steps}_unguided",
        f"teacher_{steps // 2}_guided",
        "student_trajectory",
        *(["student_distribution"] if steps == 4 else []),
        f"student_{steps}",
    ]


def kinds(steps: int) -> dict[str, str]:
    return STUDENTS | (BRANCHES if steps == 4 else {})


def weights(out: Path) -> dict[str, str]:
    """What the students' records say, and what their files say."""
    made = [name for name in (*STUDENTS, *BRANCHES) if artifact.exists(out / name)]
    found = {name: artifact.read(out / name).weights for name in made}
    assert found == {name: artifact.weights_hash(out / name) for name in made}
    return found


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what the clock says."""
    return {k: v for k, v in report.items() if k not in ("time", "seconds_per_image")}


def test_artefacts_say_what_they_are(run: Run) -> None:
    teacher = artifact.read(run.teacher, "teacher")
    for name, kind in kinds(run.steps).items():
        record = artifact.read(run.out / name, kind)  # type: ignore[arg-type]
        assert record.recipe == f"shapes_{run.steps}step" and record.grid == run.pipeline.grid
        assert record.guidance_scale == 1.0 and record.t5_tokens == teacher.t5_tokens
        assert record.parents["teacher"] == teacher.weights
    second, last = artifact.read(run.out / "03-distribution"), artifact.read(run.out / "05-merge")
    assert second.parents["student_trajectory"] == artifact.read(run.out / "02-trajectory").weights
    assert second.images_seen == 8 * run.steps
    made = weights(run.out)
    if run.steps == 4:
        assert set(last.parents.values()) == {teacher.weights, *(made[name] for name in BRANCHES)}
        measured = {f"select_strict_{name}" for name in ("a_0", "a_0.5", "sum", "branches", "before")}
        assert set(last.metrics) == measured and "merged with a_0" in last.note
        best = made["05-merge"] == made["04-split/high"]  # ratio 0 is the high branch itself
        assert best == ("merged with a_0," in last.note)
        assert len({teacher.weights, *made.values()}) == 6 - best
    else:
        assert made["05-merge"] == made["03-distribution"] and "nothing to split" in last.note
        assert not (run.out / "04-split").exists()
    assert not list(run.out.rglob("*.partial"))


def test_a_student_opens_in_stock_diffusers_and_draws(run: Run) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(run.out / "05-merge")
    pipe.set_progress_bar_config(disable=True)
    record = artifact.read(run.out / "05-merge")
    unshifted = [t / (3 - 2 * t) for t in record.grid[:-1]]
    image = pipe(
        "a red circle", guidance_scale=1, sigmas=unshifted, max_sequence_length=record.t5_tokens, height=64, width=64
    ).images[0]
    assert image.size == (64, 64)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(record.grid, abs=1e-6)


def test_the_report_holds_every_arm_and_task(run: Run) -> None:
    assert run.report == run.out / "report.html"
    data = run.numbers
    rows = {(r["name"], r["scoring"], r["task"]): r for r in data["rows"]}
    wanted = {(a, s, t) for a in arms(run.steps) for s in ("strict", "geneval") for t in (*TASKS, "overall")}
    assert set(rows) == wanted and len(data["rows"]) == len(wanted)
    for row in rows.values():
        assert 0 <= row["lo"] <= row["mean"] <= row["hi"] <= 1 and row["n_prompts"] >= 2 and row["n_seeds"] == 1
    n = run.steps
    evaluations = {r["name"]: r["nfe"] for r in data["rows"]}
    assert evaluations == dict(zip(arms(n), (0, 64, 2 * n, n, n, *[n] * (len(arms(n)) - 5)), strict=True))
    student = f"student_{n}"
    pairs = {(p["a"], p["b"]) for p in data["paired"]}
    assert (("student_distribution", "student_trajectory") in pairs) == (n == 4)
    against = {p["b"] for p in data["paired"] if p["a"] == student}
    assert against == {a for a in arms(n) if a not in (student, "autoencoder_ceiling")}
    assert {p["a"] for p in data["paired"] if p["b"] == "teacher_32_guided"} == set(arms(n)) - {"teacher_32_guided"}
    assert data["student"] == student and data["protocol"]["split"] == "report" and data["verdict"]
    merged = {"split", "merge"} if n == 4 else set()
    assert set(data["time"]) == {"trajectories", "trajectory", "distribution", "evaluate"} | merged
    assert {"diversity", "environment", "role_swap_joint", "changes"} <= data.keys()


def test_the_page_is_one_file_without_paths_of_this_machine(run: Run) -> None:
    page = (run.out / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and "data:image/png;base64," in page and "<svg" in page
    assert "src=\"http" not in page and "<link" not in page
    assert str(run.out) not in page and str(run.out) not in (run.out / "report.json").read_text()


def test_settings_and_log_are_kept(run: Run) -> None:
    import yaml

    begun = yaml.safe_load((run.out / "resolved.yaml").read_text())
    assert from_dict(build(f"shapes_{run.steps}step"), begun) == run.pipeline
    rows = read_metrics(run.out / "metrics.jsonl")
    assert [(r["stage"], r["images"]) for r in rows][-1] == (("split", 24) if run.steps == 4 else ("distribution", 16))
    assert ("distribution", 8 * run.steps) in [(r["stage"], r["images"]) for r in rows]
    assert ("trajectory", 16) in [(r["stage"], r["images"]) for r in rows]


def test_the_same_command_twice_does_nothing(run: Run) -> None:
    def state() -> dict[str, int]:
        files = (p for p in run.out.rglob("*") if p.is_file() and not p.name.startswith(("report.", ".lock")))
        return {str(p): p.stat().st_mtime_ns for p in files}

    before, report = state(), (run.out / "report.json").read_text()
    page = (run.out / "report.html").read_text()
    assert execute.run(run.pipeline, run.out) == run.report
    assert state() == before and (run.out / "report.json").read_text() == report
    assert (run.out / "report.html").read_text() == page


def test_a_run_by_stages_is_the_same_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="02-trajectory does not exist; stage `trajectory` makes it"):
        execute.run(run.pipeline, tmp_path, "distribution")
    for stage in ("trajectory", "distribution", "split", "merge"):
        assert execute.run(run.pipeline, tmp_path, stage) is None
    assert weights(tmp_path) == weights(run.out)


@pytest.mark.parametrize(
    ("teacher_steps", "scale", "baseline"), [(6, 2.0, "teacher_6_guided"), (2, 1.0, "teacher_2_unguided")]
)
def test_any_number_of_teacher_steps_and_no_guidance_make_a_report(
    tmp_path: Path, teacher_folder: Path, teacher_steps: int, scale: float, baseline: str
) -> None:
    record = artifact.read(teacher_folder)
    teacher = tmp_path / "teacher"
    pipe = sd3.load(teacher_folder)
    artifact.write(teacher, replace(record, guidance_scale=scale), lambda at: sd3.save(pipe, at))
    execute.run(tiny_recipe(teacher, 2, teacher_steps=teacher_steps), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["baseline"] == baseline
    assert ("student_2", baseline) in {(p["a"], p["b"]) for p in data["paired"]}


def test_other_settings_are_refused_in_a_begun_folder(run: Run) -> None:
    other = replace(run.pipeline, distribution=replace(run.pipeline.distribution, trajectory_weight=0.1))
    with pytest.raises(ValueError, match="was begun with distribution.trajectory_weight = 0.3, now it is 0.1"):
        execute.run(other, run.out)
    with pytest.raises(ValueError, match="unknown stage 'distil' of shapes"):
        execute.run(run.pipeline, run.out, "distil")


def kill(run: Run, out: Path, place: str, call: int) -> None:
    script = Path(__file__).with_name("killed.py")
    paths = os.pathsep.join([str(script.parent), str(script.parent.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(script), str(run.teacher), str(out), str(run.steps), place, str(call)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_kills_change_nothing(run: Run, tmp_path: Path) -> None:
    """kill -9 in every stage and in the middle of writing, one after another in one folder."""
    out = tmp_path / "out"
    for place, call in KILLS if run.steps == 4 else [KILLS[1], KILLS[3], KILLS[-1]]:
        kill(run, out, place, call)
        whole = [name for name in STUDENTS if artifact.exists(out / name)]
        done = {"distribution": 1, "split": 2, "merge": 2, "evaluation": 3}
        assert whole == [*STUDENTS][: done.get(place, len(whole))], place
    assert list((out / "evaluation").glob("*.json")) and not (out / "report.json").exists()
    execute.run(run.pipeline, out)
    assert weights(out) == weights(run.out)
    assert timeless(json.loads((out / "report.json").read_text())) == timeless(run.numbers)
    for arm in arms(run.steps):
        a, b = (outcomes.read_images(folder / "evaluation", arm) for folder in (out, run.out))
        assert (a == b).all(), arm
    kept = ("metrics.jsonl", "resolved.yaml")
    assert all((out / name).read_text() == (run.out / name).read_text() for name in kept)
    states = [trajectories.read(folder / "trajectories", 6, run.pipeline.grid).x for folder in (out, run.out)]
    assert torch.equal(*states)
