"""Distil a teacher: trajectory -> distribution -> split -> merge, and the report on what each stage brought."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.data import prompt_files, prompts, trajectories
from fewstep.engine import artifact, health
from fewstep.engine.artifact import Artifact
from fewstep.engine.checkpoint import whole_folder
from fewstep.engine.config import to_dict
from fewstep.engine.log import read_metrics
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.guidance import guided
from fewstep.models import sd3
from fewstep.recipes.arms import strict_overall, teacher_arms
from fewstep.recipes.layout import FOLDER, METRICS, PROMPTS, PROXY, SECONDS, timed
from fewstep.recipes.pipeline import Distillation
from fewstep.report import page
from fewstep.stages import distribution, evaluate, merge, split, trajectory, watch
from fewstep.worlds.shapes import TEACHER
from fewstep.worlds.shapes.data import to_uint8

HELD_OUT_SEED = 500  # added to the seed of the trajectories: their noise is not that of the held-out ones


def teacher_folder(pipeline: Distillation) -> Path:
    """Where the teacher of a distillation lies."""
    return TEACHER if pipeline.teacher == "bundled" else Path(pipeline.teacher)


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


def check(pipeline: Distillation) -> None:
    """Refuse what could only fail after the first stages have run.

    Raises:
        ValueError: no teacher, or one without its transformer; no prompts; more heads than the teacher has blocks.
    """
    folder, adversary = teacher_folder(pipeline), pipeline.distribution.adversary
    artifact.read(folder, "teacher")
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is not a model: transformer/config.json is missing. Give a diffusers pipeline folder")
    _usable(pipeline)
    blocks = json.loads(config.read_text(encoding="utf-8"))["num_layers"]
    if adversary.weight > 0 and adversary.heads > blocks:
        raise ValueError(
            f"distribution.adversary.heads = {adversary.heads}: a head reads a block of its own, and the teacher has {blocks}"
        )


def own_prompts(pipeline: Distillation, out: Path) -> list[str] | None:
    """The prompts of a run, None for the bundled world's; what is left of a file is written down when it is first read.

    Later changes of the file change nothing in a run that has begun.

    Raises:
        ValueError: as `prompt_files.read` and `usable`.
    """
    if pipeline.prompts == "shapes":
        return None
    kept = out / PROMPTS
    if kept.exists():
        texts: list[str] = json.loads(kept.read_text(encoding="utf-8"))["prompts"]
        return texts
    texts, said = _usable(pipeline)
    for sentence in said:
        print(f"prompts: {sentence}", file=sys.stderr)
    partial = kept.with_suffix(".partial")
    record = {"from": pipeline.prompts, "said": said, "prompts": texts}
    partial.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(kept)
    return texts


def _usable(pipeline: Distillation) -> tuple[list[str], list[str]]:
    if pipeline.prompts == "shapes":
        return [], []
    folder = teacher_folder(pipeline)
    fits = sd3.reads_to_the_end(folder, artifact.read(folder, "teacher").t5_tokens)
    return prompt_files.usable(prompt_files.read(Path(pipeline.prompts)), fits, pipeline.prompt_policy)


def run(pipeline: Distillation, out: Path, wanted: Sequence[str]) -> Path | None:
    """Run the wanted stages that are not yet done; returns the report if the evaluation is wanted."""
    teacher = open_teacher(teacher_folder(pipeline))
    stages: dict[str, Callable[[Distillation, Path, Teacher], None]] = {
        "trajectory": _trajectory,
        "distribution": _distribution,
        "split": _split,
        "merge": _merge,
    }
    for name, stage in stages.items():
        if name in wanted and not _done(name, out / FOLDER[name]):
            stage(pipeline, out, teacher)
    return _evaluate(pipeline, out, teacher) if "evaluate" in wanted else None


def _done(stage: str, folder: Path) -> bool:
    if stage == "split":
        return all(artifact.exists(folder / branch) for branch in (split.LOW, split.HIGH))
    return artifact.exists(folder)


def _stored(pipeline: Distillation, out: Path, teacher: Teacher) -> trajectories.Trajectories:
    """The teacher trajectories of a run; made now if they are not there."""
    config = pipeline.trajectory
    trajectories.write(
        out / "trajectories",
        teacher.velocity,
        teacher.encode,
        prompts.source(own_prompts(pipeline, out), config.seed),
        grid=pipeline.grid,
        latent_shape=_latent_shape(teacher),
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
    made = _record("student_trajectory", pipeline, teacher, config, images=_whole(config.images, config.batch))
    _write(out / FOLDER["trajectory"], made, teacher, trained)


def given(pipeline: Distillation, out: Path, teacher: Teacher, proxy: SD3Transformer2DModel, seed: int) -> distribution.Given:
    """What a refinement learns from and is watched with; the trajectories are made now if they are not there."""
    stored, watched = _stored(pipeline, out, teacher), held_out(pipeline, out, teacher)
    prompt_at = prompts.source(own_prompts(pipeline, out), seed)
    return distribution.Given(proxy, teacher.velocity, stored, teacher.encode, prompt_at, watched)


def held_out(pipeline: Distillation, out: Path, teacher: Teacher) -> watch.HeldOut | None:
    """Teacher trajectories of held-out prompts, against which the student's health is judged."""
    config = pipeline.distribution.health
    if config.looks == 0:
        return None
    texts = prompts.held_out(own_prompts(pipeline, out), config.prompts)
    count, folder = len(texts) * config.seeds, out / "held_out"
    trajectories.write(
        folder,
        teacher.velocity,
        teacher.encode,
        lambda k: texts[k // config.seeds],
        grid=pipeline.grid,
        latent_shape=_latent_shape(teacher),
        count=count,
        substeps=pipeline.trajectory.teacher_substeps,
        seed=pipeline.trajectory.seed + HELD_OUT_SEED,
        title="held-out trajectories",
    )
    stored = trajectories.read(folder, count, pipeline.grid)

    def decode(x0: Tensor) -> NDArray[np.uint8]:
        return to_uint8(sd3.decode(teacher.pipe, x0))

    return watch.HeldOut(stored, teacher.encode(stored.prompts), config.seeds, decode, out / health.PICTURES)


def _latent_shape(teacher: Teacher) -> tuple[int, int, int]:
    network = teacher.pipe.transformer.config
    return network.in_channels, network.sample_size, network.sample_size


def _distribution(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, first = pipeline.distribution, out / FOLDER["trajectory"]
    parent = artifact.read(first, "student_trajectory")
    with timed(out, "distribution"):
        learned_from = given(pipeline, out, teacher, teacher.pipe.transformer, config.seed)
        start = sd3.load(first).transformer
        state = distribution.run(config, start, learned_from, out / "work" / "distribution", out / METRICS)
    with whole_folder(out / PROXY) as partial:
        state.proxy.save_pretrained(partial)
    made = _record("student_distribution", pipeline, teacher, config, parent, images=state.images)
    _write(out / FOLDER["distribution"], made, teacher, state.students["student"])


def idle(pipeline: Distillation) -> str:
    """Why stages `split` and `merge` have nothing to do, in a sentence; empty where they have."""
    if pipeline.split.skip:
        return "split.skip is set: the student of stage `distribution` is kept"
    return split.idle(pipeline.grid, pipeline.split.boundary)


def _split(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    if idle(pipeline):
        print(idle(pipeline))
        return
    config, before = pipeline.split, out / FOLDER["distribution"]
    parent = artifact.read(before, "student_distribution")
    if not (out / PROXY / "config.json").is_file():
        raise ValueError(
            f"{out / PROXY} is missing: stage `split` goes on from the proxy that stage `distribution` left there. "
            f"Delete {before} and run again to make both anew"
        )
    proxy = SD3Transformer2DModel.from_pretrained(out / PROXY, local_files_only=True)
    with timed(out, "split"):
        learned_from = given(pipeline, out, teacher, proxy, config.seed)
        start = sd3.load(before).transformer
        state = split.run(config, pipeline.distribution, start, learned_from, out / "work" / "split", out / METRICS)
    kinds: dict[str, artifact.Kind] = {split.LOW: "student_low", split.HIGH: "student_high"}
    for name, network in state.students.items():
        record = _record(kinds[name], pipeline, teacher, config, parent, images=state.images)
        _write(out / FOLDER["split"] / name, record, teacher, network)


def _merge(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, before = pipeline.merge, out / FOLDER["distribution"]
    parent = artifact.read(before, "student_distribution")
    start = sd3.load(before).transformer
    if idle(pipeline):
        record = _record("student", pipeline, teacher, config, parent, note=idle(pipeline))
        _write(out / FOLDER["merge"], record, teacher, start)
        return
    folders = {name: out / FOLDER["split"] / name for name in (split.LOW, split.HIGH)}
    parents = [artifact.read(folders[split.LOW], "student_low"), artifact.read(folders[split.HIGH], "student_high")]
    with timed(out, "merge"):
        branches = {name: sd3.load(folder).transformer for name, folder in folders.items()}
        made = merge.candidates(config, start, branches[split.LOW], branches[split.HIGH])
        velocities = {name: sd3.velocity(network, fast_dtype()) for name, network in made.items()}
        velocities[merge.BRANCHES] = distribution.branched(branches, split.branch_at(pipeline.split.boundary))
        velocities["before"] = sd3.velocity(start, fast_dtype())
        made_of = "+".join(p.weights for p in parents)
        arms = [evaluate.Arm(name, pipeline.grid, 1.0, v, made_of) for name, v in velocities.items()]
        asked = evaluate.Config(config.per_task, config.seeds, pipeline.evaluate.batch, config.noise_seed)
        scratch, t5_tokens = out / "work" / "merge", teacher.record.t5_tokens
        collected = evaluate.run(asked, arms, teacher.pipe, t5_tokens, scratch, split="select")
        scores = {name: strict_overall(collected["arms"][name]) for name in velocities}
        chosen = merge.choose(config, scores)
    record = _record(
        "student",
        pipeline,
        teacher,
        config,
        *parents,
        metrics={f"select_strict_{name}": score for name, score in scores.items()},
        note=f"merged with {chosen}, chosen on {config.per_task} selection prompts a task x {config.seeds} seeds",
    )
    print(f"merge: {chosen} is best on selection prompts ({scores[chosen]:.1%}; before the split {scores['before']:.1%})")
    _write(out / FOLDER["merge"], record, teacher, made[chosen])


def _whole(images: int, batch: int) -> int:
    """Images in whole batches."""
    return images - images % batch


def _record(
    kind: artifact.Kind,
    pipeline: Distillation,
    teacher: Teacher,
    config: object,
    *parents: Artifact,
    images: int = 0,
    metrics: dict[str, float] | None = None,
    note: str = "",
) -> Artifact:
    return Artifact(
        kind=kind,
        recipe=pipeline.name,
        grid=pipeline.grid,
        guidance_scale=1.0,
        t5_tokens=teacher.record.t5_tokens,
        images_seen=images,
        parents={"teacher": teacher.record.weights, **{p.kind: p.weights for p in parents}},
        metrics=metrics or {},
        config=to_dict(config),
        note=note,
    )


def _write(folder: Path, record: Artifact, teacher: Teacher, transformer: SD3Transformer2DModel) -> None:
    pipe = StableDiffusion3Pipeline(**{**teacher.pipe.components, "transformer": transformer})
    artifact.write(folder, record, lambda at: sd3.save(pipe, at))


def _evaluate(pipeline: Distillation, out: Path, teacher: Teacher) -> Path:
    """All arms on the report prompts, and the report."""
    arms = teacher_arms(teacher.pipe, teacher.record, pipeline.teacher_steps, len(pipeline.grid) - 1)
    students: dict[artifact.Kind, str] = {"student_trajectory": "student_trajectory"}
    if not idle(pipeline):  # else it is the student
        students["student_distribution"] = "student_distribution"
    students["student"] = pipeline.student_name
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
    for row in read_metrics(out / SECONDS):
        spent[row["stage"]] = spent.get(row["stage"], 0.0) + row["seconds"]
    return page.write(out, collected, {"name": pipeline.name, "seconds": spent})
