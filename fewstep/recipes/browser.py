"""`fewstep browse`: what a run's student drew at every look and after every stage, as a page.

Looks are kept by `stages.watch` while the student learns. What no look shows is drawn here from what lies on disk: the student
before training, the ends of stages, and the merged student. Drawings are kept in the run's folder by the hash of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from diffusers import SD3Transformer2DModel
from filelock import FileLock, Timeout

from fewstep.conditioning import TextCond
from fewstep.engine import artifact, health, ranks
from fewstep.engine.config import to_dict
from fewstep.engine.log import Progress
from fewstep.engine.precision import fast_dtype
from fewstep.evaluate import benchmark, looks
from fewstep.flow import Velocity
from fewstep.models import sd3
from fewstep.recipes import material, students
from fewstep.recipes.layout import FOLDER, RESOLVED
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.teacher import Teacher, folder_of, open_for
from fewstep.report import browser
from fewstep.report.browser import Step
from fewstep.solvers import in_chunks, rollout
from fewstep.stages import encoders, trajectory, watch
from fewstep.stages.branches import HIGH, LOW, branch_at, branched

FEW = health.Config(looks=1, prompts=6, seeds=2)  # what a run that never looks is asked
GOING_ON = "The run is still going on: this is what it has looked at so far."
Open = Callable[[Distillation, Teacher], Velocity]


class State(NamedTuple):
    """A state of the student, by its images.

    Attributes:
        stage, title, note: see `report.browser.Step`.
        sheet: where its images lie.
        weights: hash of its weights, where it is drawn here; empty where a look has drawn it.
        open: its velocity, unguided, where it is drawn here.
    """

    stage: str
    title: str
    note: str
    sheet: Path
    weights: str = ""
    open: Open | None = None


def write(pipeline: Distillation, out: Path, teacher: Teacher | None = None) -> Path | None:
    """Draw what is missing of a run, and write its page; of several processes the first one does.

    Args:
        pipeline: its settings.
        out: its folder, which nobody else works in.
        teacher: if it is open already; else it is opened where something is missing.

    Returns:
        The page, `out`/browser.html.

    Raises:
        ValueError: nothing there to show yet, or a damaged sheet.
    """
    if not ranks.first():
        return None
    states = plan(pipeline, out)
    missing = [state for state in states if not _there(pipeline, state)]
    if ranks.count() > 1:  # drawing waits for all processes, and the others have gone: `fewstep browse` adds what is missing
        return _page(pipeline, out, [s for s in states if s not in missing]) if _teachers(out).is_file() else None
    if missing or not _teachers(out).is_file():
        _draw(pipeline, out, teacher or open_for(pipeline, out), missing)
    return _page(pipeline, out, states)


def of_run(out: Path) -> Path:
    """The page of a run; of one that a process works in, what it has looked at so far.

    Raises:
        ValueError: not the run of a distillation, or nothing there to show yet.
    """
    from fewstep.recipes import demo  # it leads here itself, by the end of a run

    resolved = out / RESOLVED
    if not resolved.is_file():
        raise ValueError(f"{out} is no run: {RESOLVED} is missing. Give the folder of `fewstep run` or `fewstep demo`")
    told = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    pipeline = demo.resolve(str(told.get("name")) if isinstance(told, dict) else "", [], resolved)
    if not isinstance(pipeline, Distillation):
        raise ValueError(f"{out} trained a teacher: there is no student to look at")
    lock = FileLock(out / ".lock")  # as `execute.alone` holds it
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _page(pipeline, out, [state for state in plan(pipeline, out) if _there(pipeline, state)], GOING_ON)
    with lock:
        page = write(pipeline, out)
    assert page is not None
    return page


def plan(pipeline: Distillation, out: Path) -> list[State]:
    """The states of a run's student in order: before training, at every look, at the end of every stage."""
    states = [_before(pipeline, out), *_end(pipeline, out, "trajectory", "distribution")]
    for stage in ("distribution", "split"):
        end = _end(pipeline, out, stage, stage)
        seen = [(int(path.name[len(stage) + 1 :].split(".")[0]), path) for path in _sheets(out, stage)]
        between = [(images, path) for images, path in seen if images > 0 and path not in [state.sheet for state in end]]
        states += [State(stage, f"{stage}, {images:,} images", "", path) for images, path in between] + end
    merged, before = out / FOLDER["merge"], out / FOLDER["distribution"]
    if artifact.exists(merged):
        record = artifact.read(merged)
        kept = artifact.exists(before) and artifact.read(before).weights == record.weights
        states += [] if kept else [_drawn(pipeline, out, "merge", "student", record.note.split(",")[0], record.weights, merged)]
    return states


def _before(pipeline: Distillation, out: Path) -> State:
    """The student before training: its teacher on the student's grid without guidance, or the student that it starts from."""
    if pipeline.start:
        folder = Path(pipeline.start)
        note = "the student that it starts from"
        return _drawn(pipeline, out, "start", "before training", note, artifact.read(folder).weights, folder)
    count = len(pipeline.grid) - 1
    note = f"the teacher in {count} step{'s' * (count > 1)}, unguided"
    weights = artifact.read(folder_of(pipeline), "teacher").weights

    def opened(own: Distillation, teacher: Teacher) -> Velocity:
        return _velocity(own, teacher, teacher.pipe.transformer)

    return State("start", "before training", note, _sheet(out, "start"), weights, opened)


def _end(pipeline: Distillation, out: Path, stage: str, looked_at: str) -> list[State]:
    """What a stage handed on, if it has ended: as a look saw it, else drawn. The next stage looks at the warm start."""
    folder, title = out / FOLDER[stage], f"after {stage}"
    if stage == "split":
        parts = [folder / LOW, folder / HIGH]
        if not all(artifact.exists(part) for part in parts):
            return []
        records = [artifact.read(part) for part in parts]
    elif artifact.exists(folder):
        records = [artifact.read(folder)]
    else:
        return []
    images = 0 if stage != looked_at else records[0].images_seen
    sheet = out / looks.FOLDER / looks.file_name(looked_at, images)
    back = stage == looked_at and any(path.name > sheet.name for path in _sheets(out, stage))
    note = f"{records[0].images_seen:,} images" + (", rolled back to" if back else "")
    if sheet.is_file():
        return [State(stage, title, note, sheet)]
    weights = "+".join(record.weights for record in records)
    if stage != "split":
        return [_drawn(pipeline, out, stage, title, note, weights, folder)]

    def both(own: Distillation, teacher: Teacher) -> Velocity:
        networks = {name: students.read(own.roles, teacher, folder / name).to(own.roles.place) for name in (LOW, HIGH)}
        return encoders.told(branched(networks, branch_at(own.split.boundary)), _reads(own, teacher))

    return [State(stage, title, note, _sheet(out, stage), weights, both)]


def _drawn(pipeline: Distillation, out: Path, stage: str, title: str, note: str, weights: str, folder: Path) -> State:
    """A state that lies on disk as a student."""

    def opened(own: Distillation, teacher: Teacher) -> Velocity:
        return _velocity(own, teacher, students.read(own.roles, teacher, folder).to(own.roles.place))

    return State(stage, title, note, _sheet(out, stage), weights, opened)


def _velocity(pipeline: Distillation, teacher: Teacher, network: SD3Transformer2DModel) -> Velocity:
    return encoders.told(sd3.velocity(network, fast_dtype(network.device)), _reads(pipeline, teacher))


def _reads(pipeline: Distillation, teacher: Teacher) -> Callable[[TextCond], TextCond]:
    return encoders.given(pipeline.encoders.encoders, pipeline.encoders.padded, teacher.layout)


def _sheet(out: Path, stage: str) -> Path:
    return out / looks.FOLDER / f"{stage}{looks.ENDING}"


def _sheets(out: Path, stage: str) -> list[Path]:
    return sorted((out / looks.FOLDER).glob(f"{stage}-*{looks.ENDING}"))


def _teachers(out: Path) -> Path:
    return out / looks.FOLDER / looks.TEACHER


def _there(pipeline: Distillation, state: State) -> bool:
    """Whether the images of a state are there; a drawing of other weights, or of another question, is not."""
    if state.open is None:
        return True
    if not state.sheet.is_file():
        return False
    try:
        return _told(looks.read(state.sheet).about) == (state.weights, _asked(pipeline))
    except ValueError:  # damaged: drawn again
        return False


def _told(about: dict[str, Any]) -> tuple[Any, Any]:
    return about.get("weights"), about.get("asked")


def _asked(pipeline: Distillation) -> str:
    """Hash of all that decides a drawing besides the weights."""
    h, seed = pipeline.distribution.health, pipeline.trajectory.seed
    asked = {"grid": pipeline.grid, "prompts": pipeline.prompts, "seed": seed, "pixels": pipeline.resolution}
    return benchmark.digest(asked | {"looks": [h.looks > 0, h.prompts, h.seeds], "encoders": to_dict(pipeline.encoders)})


@torch.no_grad()
def _draw(pipeline: Distillation, out: Path, teacher: Teacher, missing: Sequence[State]) -> None:
    """Sheets of the teacher and of what no look has seen, from the noise of the looks."""
    config = pipeline.distribution
    if config.health.looks == 0:
        pipeline = replace(pipeline, distribution=replace(config, health=FEW))
    held_out = material.held_out(pipeline, out, teacher)
    assert held_out is not None
    if not _teachers(out).is_file():
        looks.write(_teachers(out), *watch.shown(held_out, held_out.stored.x[:, -1]))
    noises, size = held_out.stored.x[:, 0], config.micro_batch or config.batch
    progress = Progress("images for the browser", len(missing))
    for k, state in enumerate(missing, start=1):
        assert state.open is not None
        velocity = in_chunks(state.open(pipeline, teacher), size)
        x0 = rollout(velocity, noises, pipeline.grid, held_out.cond).x[-1]
        images, texts = watch.shown(held_out, x0)
        looks.write(state.sheet, images, texts, {"weights": state.weights, "asked": _asked(pipeline)})
        progress.show(k)
    if missing:
        progress.close()


def _page(pipeline: Distillation, out: Path, states: Sequence[State], said: str = "") -> Path:
    if not _teachers(out).is_file():
        raise ValueError(f"{out} holds no images yet: wait for the first look, or for the end of a stage")
    pinned = looks.read(_teachers(out))
    steps = [Step(state.stage, state.title, state.note, looks.read(state.sheet).images) for state in states]
    evaluations = trajectory.evaluations(pipeline.trajectory, len(pipeline.grid) - 1)
    note = f"{evaluations} evaluations an image, from the same noise"
    teacher = Step("teacher", "teacher", note, pinned.images)
    judged = pipeline.evaluate.benchmark == "shapes" and pipeline.prompts == "shapes"
    return browser.write(out / browser.PAGE, pipeline.name, pinned.texts, teacher, steps, judged, said)
