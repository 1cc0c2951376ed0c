"""Distil a teacher: trajectory -> distribution -> split -> merge, and the report on what each stage brought."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from diffusers import SD3Transformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data import prompt_files, prompts, trajectories
from fewstep.engine import artifact, health, ranks
from fewstep.engine.checkpoint import whole_folder
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.models import adapters, sd3
from fewstep.recipes import assess, students
from fewstep.recipes.layout import FOLDER, METRICS, PROMPTS, PROXY, timed
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.sd35 import SOURCES
from fewstep.recipes.teacher import Teacher, folder_of, open_for
from fewstep.stages import distribution, evaluate, merge, refinement, split, trajectory, watch
from fewstep.worlds.shapes.data import to_uint8

HELD_OUT_SEED = 500  # added to the seed of the trajectories: their noise is not that of the held-out ones


def check(pipeline: Distillation) -> None:
    """Refuse what could only fail after the first stages have run.

    Raises:
        ValueError: no teacher, or one without its transformer; a start that is not its student; no prompts; no such device; a
            resolution that it does not know; more heads than it has blocks.
    """
    folder, adversary = folder_of(pipeline), pipeline.distribution.adversary
    if pipeline.name in SOURCES and not folder.exists():
        raise ValueError(f"{folder} does not exist: fewstep adopt {SOURCES[pipeline.name]} --out {folder} makes it")
    record = artifact.read(folder, "teacher")
    if pipeline.start:
        students.check_start(pipeline.roles, Path(pipeline.start), record)
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is not a model: transformer/config.json is missing. Give a diffusers pipeline folder")
    _usable(pipeline)
    network = json.loads(config.read_text(encoding="utf-8"))
    _ = pipeline.roles.place  # a device that is not there
    largest = 16 * network["pos_embed_max_size"]
    if pipeline.resolution > largest:
        raise ValueError(f"resolution = {pipeline.resolution}: the teacher knows positions up to {largest} pixels")
    blocks = network["num_layers"]
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
    folder = folder_of(pipeline)
    fits = sd3.reads_to_the_end(folder, artifact.read(folder, "teacher").t5_tokens)
    return prompt_files.usable(prompt_files.read(Path(pipeline.prompts)), fits, pipeline.prompt_policy)


def run(pipeline: Distillation, out: Path, wanted: Sequence[str]) -> Path | None:
    """Run the wanted stages that are not yet done; returns the report if the evaluation is wanted."""
    with ranks.first_alone() as mine:
        if mine:
            own_prompts(pipeline, out)
    teacher = open_for(pipeline, out, _all_prompts(pipeline, out))
    stages: dict[str, Callable[[Distillation, Path, Teacher], None]] = {
        "trajectory": _trajectory,
        "distribution": _distribution,
        "split": _split,
        "merge": _merge,
    }
    for name, stage in stages.items():
        if name == "merge" and not ranks.first():  # nothing is trained from here on
            return None
        if name in wanted and not _done(name, out / FOLDER[name]):
            stage(pipeline, out, teacher)
    return _evaluate(pipeline, out, teacher) if "evaluate" in wanted else None


def _all_prompts(pipeline: Distillation, out: Path) -> Iterator[str]:
    """Every prompt that a run will meet."""
    own = own_prompts(pipeline, out)
    for seed, count in (
        (pipeline.trajectory.seed, pipeline.trajectory.trajectories),
        (pipeline.distribution.seed, pipeline.distribution.images),
        (pipeline.split.seed, pipeline.split.images),
    ):
        at = prompts.source(own, seed)
        yield from (at(k) for k in range(count))
    yield from prompts.held_out(own, max(pipeline.distribution.health.prompts, pipeline.evaluate.pictures))
    yield from prompts.reported(own, pipeline.evaluate.pictures)


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
        latent_shape=teacher.latent,
        count=config.trajectories,
        substeps=config.teacher_substeps,
        seed=config.seed,
    )
    return trajectories.read(out / "trajectories", config.trajectories, pipeline.grid)


def _trajectory(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, start, parents = pipeline.trajectory, teacher.pipe.transformer, []
    if pipeline.start:
        start, parents = students.read(pipeline.roles, teacher, Path(pipeline.start)), [artifact.read(Path(pipeline.start))]
    with timed(out, "trajectories"):
        stored = _stored(pipeline, out, teacher)
    with timed(out, "trajectory"):
        work = out / "work" / "trajectory"
        trained = trajectory.run(config, start, stored, teacher.encode, work, out / METRICS, pipeline.roles)
    images = _whole(config.images, config.batch)
    made = students.record("student_trajectory", pipeline, teacher, config, *parents, images=images)
    with ranks.first_alone() as mine:
        if mine:
            students.write(out / FOLDER["trajectory"], made, teacher, trained)


def given(pipeline: Distillation, out: Path, teacher: Teacher, proxy: SD3Transformer2DModel, seed: int) -> distribution.Given:
    """What a refinement learns from and is watched with; the trajectories are made now if they are not there."""
    stored, watched = _stored(pipeline, out, teacher), held_out(pipeline, out, teacher)
    prompt_at = prompts.source(own_prompts(pipeline, out), seed)
    return distribution.Given(proxy, teacher.velocity, stored, teacher.encode, prompt_at, watched, pipeline.roles)


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
        latent_shape=teacher.latent,
        count=count,
        substeps=pipeline.trajectory.teacher_substeps,
        seed=pipeline.trajectory.seed + HELD_OUT_SEED,
        title="held-out trajectories",
    )
    stored = trajectories.read(folder, count, pipeline.grid)

    def decode(x0: Tensor) -> NDArray[np.uint8]:
        return to_uint8(sd3.decode(teacher.pipe, x0))

    return watch.HeldOut(stored, teacher.encode(stored.prompts), config.seeds, decode, out / health.PICTURES)


def _distribution(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, first = pipeline.distribution, out / FOLDER["trajectory"]
    parent = artifact.read(first, "student_trajectory")
    with timed(out, "distribution"):
        learned_from = given(pipeline, out, teacher, teacher.pipe.transformer, config.seed)
        start = students.read(pipeline.roles, teacher, first)
        state = refinement.run(config, start, learned_from, out / "work" / "distribution", out / METRICS)
    made = students.record("student_distribution", pipeline, teacher, config, parent, images=state.images)
    with ranks.first_alone() as mine:
        if mine:
            with whole_folder(out / PROXY) as partial:
                students.write_proxy(partial, state.proxy)
            students.write(out / FOLDER["distribution"], made, teacher, state.students["student"])


def idle(pipeline: Distillation) -> str:
    """Why stages `split` and `merge` have nothing to do, in a sentence; empty where they have."""
    if pipeline.split.skip:
        return "split.skip is set: the student of stage `distribution` is kept"
    return split.idle(pipeline.grid, pipeline.split.boundary)


def _split(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    if idle(pipeline):
        if ranks.first():
            print(idle(pipeline))
        return
    config, before = pipeline.split, out / FOLDER["distribution"]
    parent = artifact.read(before, "student_distribution")
    proxy = students.read_proxy(pipeline.roles, teacher, out / PROXY)
    with timed(out, "split"):
        learned_from = given(pipeline, out, teacher, proxy, config.seed)
        start = students.read(pipeline.roles, teacher, before)
        state = split.run(config, pipeline.distribution, start, learned_from, out / "work" / "split", out / METRICS)
    kinds: dict[str, artifact.Kind] = {split.LOW: "student_low", split.HIGH: "student_high"}
    with ranks.first_alone() as mine:
        for name, network in state.students.items() if mine else ():
            record = students.record(kinds[name], pipeline, teacher, config, parent, images=state.images)
            students.write(out / FOLDER["split"] / name, record, teacher, network)


def _merge(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, before = pipeline.merge, out / FOLDER["distribution"]
    parent = artifact.read(before, "student_distribution")
    start = students.read(pipeline.roles, teacher, before)
    if idle(pipeline):
        record = students.record("student", pipeline, teacher, config, parent, note=idle(pipeline))
        students.write(out / FOLDER["merge"], record, teacher, start)
        return
    folders = {name: out / FOLDER["split"] / name for name in (split.LOW, split.HIGH)}
    parents = [artifact.read(folders[split.LOW], "student_low"), artifact.read(folders[split.HIGH], "student_high")]
    branches = {name: students.read(pipeline.roles, teacher, folder) for name, folder in folders.items()}
    with timed(out, "merge"):
        score = assess.chooser(pipeline, own_prompts(pipeline, out), teacher, out / "work" / "merge")
        made_of, scores = "+".join(p.weights for p in parents), {}
        for name, velocity in _candidates(pipeline, teacher, start, branches):
            scores[name] = score(evaluate.Arm(name, pipeline.grid, 1.0, velocity, made_of))
        chosen = merge.choose(config, scores)
    what, asked = "strict", f"{config.per_task} selection prompts a task"
    if pipeline.evaluate.benchmark == "pictures":
        what, asked = "nearness", f"{pipeline.evaluate.pictures} held-out prompts"
    record = students.record(
        "student",
        pipeline,
        teacher,
        config,
        *parents,
        metrics={f"select_{what}_{name}": value for name, value in scores.items()},
        note=f"merged with {chosen}, chosen on {asked} x {config.seeds} seeds",
    )
    print(f"merge: {chosen} is best on selection prompts ({what} {scores[chosen]:.3f}; before it {scores['before']:.3f})")
    students.write(out / FOLDER["merge"], record, teacher, _mixed(chosen, teacher, start, branches))


def _mixed(
    name: str, teacher: Teacher, start: SD3Transformer2DModel, branches: dict[str, SD3Transformer2DModel]
) -> SD3Transformer2DModel:
    """A mixture of the branches: of adapters it is one adapter on the teacher again, exactly."""
    parts = start, branches[split.LOW], branches[split.HIGH]
    if not adapters.has(start):
        return merge.candidate(name, *(part.cpu() for part in parts))
    weights = adapters.combine([adapters.state(part) for part in parts], merge.shares(name))
    return adapters.attach(teacher.pipe.transformer, weights)


def _candidates(
    pipeline: Distillation, teacher: Teacher, start: SD3Transformer2DModel, branches: dict[str, SD3Transformer2DModel]
) -> Iterator[tuple[str, Velocity]]:
    """What stage `merge` measures: the mixtures, both branches kept apart, and the student before the split."""
    place = pipeline.roles.place

    def velocity(network: SD3Transformer2DModel) -> Velocity:
        return sd3.velocity(network, fast_dtype(network.device))

    for name in merge.names(pipeline.merge):
        yield name, velocity(_mixed(name, teacher, start, branches).to(place))
    on_device = {name: branch.to(place) for name, branch in branches.items()}
    yield merge.BRANCHES, distribution.branched(on_device, split.branch_at(pipeline.split.boundary))
    yield "before", velocity(start.to(place))


def _whole(images: int, batch: int) -> int:
    """Images in whole batches."""
    return images - images % batch


def _evaluate(pipeline: Distillation, out: Path, teacher: Teacher) -> Path:
    """All arms on the report prompts, and the report."""
    made: dict[artifact.Kind, str] = {"student_trajectory": "student_trajectory"}
    if not idle(pipeline):  # else it is the student
        made["student_distribution"] = "student_distribution"
    made["student"] = pipeline.student_name
    return assess.report(pipeline, own_prompts(pipeline, out), out, teacher, made)
