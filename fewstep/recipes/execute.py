"""Run a pipeline: stages in order, artefacts between them, nothing done twice (D12)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from fewstep import grids
from fewstep.conditioning import TextCond
from fewstep.data import prompts, trajectories
from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.engine.config import to_dict
from fewstep.engine.log import read_metrics
from fewstep.engine.precision import fast_dtype
from fewstep.evaluate.outcomes import Outcome
from fewstep.flow import Velocity
from fewstep.guidance import guided
from fewstep.models import sd3
from fewstep.recipes.pipeline import BUNDLED, Distillation, Pipeline, TeacherTraining
from fewstep.report import numbers, page
from fewstep.stages import autoencoder, distribution, evaluate, teacher, trajectory
from fewstep.worlds.shapes.architecture import MAX_TOKENS
from fewstep.worlds.shapes.data import write_latents

RESOLVED, METRICS = "resolved.yaml", "metrics.jsonl"
FOLDER = {
    "autoencoder": "00-autoencoder",
    "teacher": "01-teacher",
    "trajectory": "02-trajectory",
    "distribution": "03-distribution",
}


def claim(pipeline: Pipeline, out: Path) -> None:
    """Make the run's folder and write the resolved settings, or check that they are the ones it was begun with.

    Raises:
        ValueError: when the folder was begun with other settings; names the first that differs.
        OSError: when it cannot be written.
    """
    resolved, path = to_dict(pipeline), out / RESOLVED
    if path.exists():
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, (old, new) in differences(begun, resolved).items():
            raise ValueError(
                f"{out} was begun with {key} = {old!r}, now it is {new!r}: give the same settings to go on, "
                "or another --out to start anew"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
    partial.replace(path)


def differences(a: object, b: object, where: str = "") -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ between two nested settings, in order."""
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, tuple[object, object]] = {}
        for key in [*b, *(k for k in a if k not in b)]:
            found |= differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return found
    return {} if a == b else {where: (a, b)}


def run(pipeline: Pipeline, out: Path, stage: str | None = None) -> Path | None:
    """Run all stages, or one; whole artefacts are kept, checkpoints are gone on from.

    Args:
        pipeline: a recipe's settings.
        out: the run's folder.
        stage: only this one; what it needs must be there.

    Returns:
        The report, when the evaluation ran.

    Raises:
        ValueError: unknown stage, other settings than the folder was begun with, a missing or wrong artefact.
        OSError: full disk or unwritable folder; what is whole stays.
        FloatingPointError: a loss is not finite.
    """
    if stage is not None and stage not in pipeline.stages:
        raise ValueError(f"unknown stage {stage!r} of {pipeline.name}; one of {', '.join(pipeline.stages)}")
    if isinstance(pipeline, Distillation):  # before the folder is claimed with settings that cannot work
        artifact.read(teacher_folder(pipeline), "teacher")
        prompts.source(pipeline.prompts, 0)
    claim(pipeline, out)
    wanted = pipeline.stages if stage is None else (stage,)
    if isinstance(pipeline, TeacherTraining):
        return _train_teacher(pipeline, out, wanted)
    return _distil(pipeline, out, wanted)


def teacher_folder(pipeline: Distillation) -> Path:
    """Where the teacher of a distillation lies."""
    return BUNDLED if pipeline.teacher == "bundled" else Path(pipeline.teacher)


@dataclass(frozen=True)
class Teacher:
    """An opened teacher artefact: its record, its pipeline, prompts to conditions, and its guided velocity."""

    record: Artifact
    pipe: StableDiffusion3Pipeline
    encode: trajectories.Encode
    velocity: Velocity


def open_teacher(folder: Path) -> Teacher:
    """Open a teacher.

    Raises:
        ValueError: not an artefact, or not a teacher.
    """
    record = artifact.read(folder, "teacher")
    pipe = sd3.load(folder)

    def encode(texts: Sequence[str]) -> TextCond:
        return evaluate.encode(pipe, texts, record.t5_tokens, 256)

    network = sd3.velocity(pipe.transformer, fast_dtype())
    return Teacher(record, pipe, encode, guided(network, encode([""]), record.guidance_scale))


def _distil(pipeline: Distillation, out: Path, wanted: Sequence[str]) -> Path | None:
    teacher = open_teacher(teacher_folder(pipeline))
    if "trajectory" in wanted and not artifact.exists(out / FOLDER["trajectory"]):
        _trajectory(pipeline, out, teacher)
    if "distribution" in wanted and not artifact.exists(out / FOLDER["distribution"]):
        _distribution(pipeline, out, teacher)
    return _evaluate(pipeline, out, teacher) if "evaluate" in wanted else None


def _stored(pipeline: Distillation, out: Path, teacher: Teacher) -> trajectories.Trajectories:
    """The teacher trajectories of a run; made now if they are not there."""
    config, network = pipeline.trajectory, teacher.pipe.transformer.config
    trajectories.write(
        out / "trajectories",
        teacher.velocity,
        teacher.encode,
        prompts.source(pipeline.prompts, config.seed),
        grid=pipeline.grid,
        latent_shape=(network.in_channels, network.sample_size, network.sample_size),
        count=config.trajectories,
        substeps=config.teacher_substeps,
        seed=config.seed,
    )
    return trajectories.read(out / "trajectories", config.trajectories, pipeline.grid)


def _trajectory(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, start = pipeline.trajectory, teacher.pipe.transformer
    with timed(out, "trajectories"):
        stored = _stored(pipeline, out, teacher)
    with timed(out, "trajectory"):
        trained = trajectory.run(config, start, stored, teacher.encode, out / "work" / "trajectory", out / METRICS)
    made = _student("student_trajectory", pipeline, teacher, {}, _seen(config), config)
    _write_student(out / FOLDER["trajectory"], made, teacher, trained)


def _distribution(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, first = pipeline.distribution, out / FOLDER["trajectory"]
    parent = artifact.read(first, "student_trajectory")
    with timed(out, "distribution"):
        trained = distribution.run(
            config,
            sd3.load(first).transformer,
            teacher.pipe.transformer,
            teacher.velocity,
            _stored(pipeline, out, teacher),
            teacher.encode,
            prompts.source(pipeline.prompts, config.seed),
            out / "work" / "distribution",
            out / METRICS,
        )
    made = _student("student", pipeline, teacher, {parent.kind: parent.weights}, _seen(config), config)
    _write_student(out / FOLDER["distribution"], made, teacher, trained)


def _seen(config: trajectory.Config | distribution.Config) -> int:
    """Images in whole batches."""
    return config.images - config.images % config.batch


def _student(
    kind: artifact.Kind, pipeline: Distillation, teacher: Teacher, parents: dict[str, str], images: int, config: object
) -> Artifact:
    return Artifact(
        kind=kind,
        recipe=pipeline.name,
        grid=pipeline.grid,
        guidance_scale=1.0,
        t5_tokens=teacher.record.t5_tokens,
        images_seen=images,
        parents={"teacher": teacher.record.weights, **parents},
        config=to_dict(config),
    )


def _write_student(folder: Path, record: Artifact, teacher: Teacher, transformer: SD3Transformer2DModel) -> None:
    pipe = StableDiffusion3Pipeline(**{**teacher.pipe.components, "transformer": transformer})
    artifact.write(folder, record, lambda at: sd3.save(pipe, at))


def _evaluate(pipeline: Distillation, out: Path, teacher: Teacher) -> Path:
    """All arms on the report prompts, and the report."""
    arms = teacher_arms(teacher.pipe, teacher.record, pipeline.teacher_steps, len(pipeline.grid) - 1)
    students: dict[artifact.Kind, str] = {"student_trajectory": "student_trajectory", "student": pipeline.student_name}
    for kind, name in students.items():
        folder = out / FOLDER[artifact.MAKER[kind]]
        made = artifact.read(folder, kind)
        network = sd3.velocity(sd3.load(folder).transformer, fast_dtype())
        arms.append(evaluate.Arm(name, made.grid, made.guidance_scale, network, made.weights))
    with nullcontext() if evaluate.whole(pipeline.evaluate, arms, out / page.EVALUATION) else timed(out, "evaluate"):
        collected = evaluate.run(
            pipeline.evaluate, arms, teacher.pipe, teacher.record.t5_tokens, out / page.EVALUATION
        )
    spent: dict[str, float] = {}
    for row in read_metrics(out / "seconds.jsonl"):
        spent[row["stage"]] = spent.get(row["stage"], 0.0) + row["seconds"]
    return page.write(out, collected, {"name": pipeline.name, "seconds": spent})


def teacher_arms(pipe: StableDiffusion3Pipeline, record: Artifact, teacher_steps: int, steps: int) -> list[evaluate.Arm]:
    """The ceiling; the teacher in full, at the student's steps with guidance, and at the student's evaluations."""
    network = sd3.velocity(pipe.transformer, fast_dtype())

    def arm(count: int, scale: float) -> evaluate.Arm:
        name = f"teacher_{count}_{'unguided' if scale == 1 else 'guided'}"
        return evaluate.Arm(name, grids.shifted_grid(count), scale, network, record.weights)

    w = record.guidance_scale
    arms = [evaluate.Arm("autoencoder_ceiling", (), 1.0, None, record.weights)]
    arms += [arm(teacher_steps, w), arm(steps, w), arm(steps, 1.0)]
    arms += [arm(steps // 2, w)] if steps % 2 == 0 else []
    return list({arm.name: arm for arm in arms}.values())  # some coincide where the teacher needs no guidance


def _train_teacher(pipeline: TeacherTraining, out: Path, wanted: Sequence[str]) -> Path | None:
    work, metrics = out / "work", out / METRICS
    vae_folder, folder = out / FOLDER["autoencoder"], out / FOLDER["teacher"]
    if "autoencoder" in wanted and not (vae_folder / "config.json").is_file():
        if pipeline.reuse_autoencoder:
            vae = autoencoder.load(BUNDLED / "vae")
        else:
            with timed(out, "autoencoder"):
                vae = autoencoder.run(pipeline.autoencoder, work / "autoencoder", metrics)
        partial = vae_folder.with_name(vae_folder.name + ".partial")
        vae.save_pretrained(partial)
        partial.replace(vae_folder)
    if "teacher" in wanted and not artifact.exists(folder):
        vae = autoencoder.load(vae_folder)
        latents = out / "latents"
        with timed(out, "teacher"):
            write_latents(vae, pipeline.teacher.latents, pipeline.teacher.seed + 100, latents)
            pipe = teacher.untrained(pipeline.teacher, vae)
            teacher.run(pipeline.teacher, pipe, latents, work / "teacher", metrics)
            choose_and_write(pipeline, pipe, folder, out / "selection")
    if "evaluate" not in wanted:
        return None
    record, pipe = artifact.read(folder, "teacher"), sd3.load(folder)
    arms = teacher_arms(pipe, record, pipeline.teacher_steps, 4)
    collected = evaluate.run(pipeline.evaluate, arms, pipe, record.t5_tokens, out / page.EVALUATION)
    rows = [row for arm in collected["arms"].values() for row in numbers.rows(arm)]
    partial = out / "report.json.partial"
    partial.write_text(json.dumps({"protocol": collected["protocol"], "rows": rows}, indent=1))
    return partial.replace(out / "report.json")


def choose_and_write(pipeline: TeacherTraining, pipe: StableDiffusion3Pipeline, folder: Path, scratch: Path) -> Artifact:
    """Choose the guidance scale on selection prompts by the strict overall score, and write the teacher's artefact."""
    network, grid = sd3.velocity(pipe.transformer, fast_dtype()), grids.shifted_grid(pipeline.teacher_steps)
    arms = [evaluate.Arm(f"w_{w:g}", grid, w, network, "selection") for w in pipeline.guidance_scales]
    collected = evaluate.run(pipeline.evaluate, arms, pipe, MAX_TOKENS, scratch, split="select")
    scores = {w: strict_overall(collected["arms"][f"w_{w:g}"]) for w in pipeline.guidance_scales}
    best = max(scores, key=lambda w: scores[w])
    made = Artifact(
        kind="teacher",
        recipe=pipeline.name,
        grid=grid,
        guidance_scale=best,
        t5_tokens=MAX_TOKENS,
        images_seen=pipeline.teacher.images,
        metrics={f"select_strict_w_{w:g}": score for w, score in scores.items()},
        config=to_dict(pipeline.teacher),
    )
    return artifact.write(folder, made, lambda at: sd3.save(pipe, at))


def strict_overall(arm: Outcome) -> float:
    """The headline score of an arm, in [0, 1]."""
    found = [r for r in numbers.rows(arm) if r["scoring"] == "strict" and r["task"] == "overall"]
    return float(found[0]["mean"])


@contextmanager
def timed(out: Path, stage: str) -> Iterator[None]:
    """Append the seconds of a block to `seconds.jsonl`; the time of a killed block is not counted."""
    start = time.monotonic()
    yield
    with (out / "seconds.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(time.monotonic() - start, 1)}) + "\n")
