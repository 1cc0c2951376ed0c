"""Distil a teacher: trajectory -> distribution -> split -> merge, and the report on what each stage brought."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from diffusers import SD3Transformer2DModel

from fewstep.engine import artifact, ranks
from fewstep.engine.checkpoint import whole_folder
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.models import adapters, eight_bit, roles, sd3
from fewstep.recipes import assess, browser, material, students
from fewstep.recipes.layout import FOLDER, METRICS, PROXY, timed
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.sd35 import SOURCES
from fewstep.recipes.teacher import Teacher, folder_of, open_for
from fewstep.stages import encoders, evaluate, merge, refinement, split, trajectory
from fewstep.stages.branches import HIGH, LOW, branch_at, branched


def check(pipeline: Distillation) -> None:
    """Refuse what could only fail after the first stages have run.

    Raises:
        ValueError: no teacher, or one without its transformer; a start that is not its student; no prompts; no such device; no
            torchao where it is needed; a resolution that it does not know; more heads than it has blocks.
    """
    folder, adversary = folder_of(pipeline), pipeline.distribution.adversary
    if pipeline.name in SOURCES and not folder.exists():
        raise ValueError(f"{folder} does not exist: fewstep adopt {SOURCES[pipeline.name]} --out {folder} makes it")
    record = artifact.read(folder, "teacher")
    if pipeline.data_teacher:
        _check_data_teacher(folder, Path(pipeline.data_teacher))
    if pipeline.start:
        students.check_start(pipeline.roles, Path(pipeline.start), record)
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is not a model: transformer/config.json is missing. Give a diffusers pipeline folder")
    material.usable(pipeline)
    network = json.loads(config.read_text(encoding="utf-8"))
    _ = pipeline.roles.place  # a device that is not there
    if pipeline.roles.eight_bit_base or pipeline.roles.eight_bit_moments:
        eight_bit.require()
    largest = 16 * network["pos_embed_max_size"]
    if pipeline.resolution > largest:
        raise ValueError(f"resolution = {pipeline.resolution}: the teacher knows positions up to {largest} pixels")
    blocks = network["num_layers"]
    if adversary.weight > 0 and adversary.heads > blocks:
        raise ValueError(
            f"distribution.adversary.heads = {adversary.heads}: a head reads a block of its own, and the teacher has {blocks}"
        )


def _check_data_teacher(teacher: Path, other: Path) -> None:
    """Whether another teacher reads the same conditions and draws in the same latents.

    Raises:
        ValueError: not a teacher, or not of the same family.
    """
    artifact.read(other, "teacher")
    read = [json.loads((at / "transformer" / "config.json").read_text(encoding="utf-8")) for at in (teacher, other)]
    for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim"):
        if read[0][name] != read[1][name]:
            raise ValueError(f"data_teacher = {other}: its {name} is {read[1][name]}, the teacher's {read[0][name]}")
    if artifact.weights_hash(teacher / "vae") != artifact.weights_hash(other / "vae"):
        raise ValueError(f"data_teacher = {other}: its autoencoder is another one, so its latents mean other pictures")


def run(pipeline: Distillation, out: Path, wanted: Sequence[str]) -> Path | None:
    """Run the wanted stages that are not yet done; returns the report if the evaluation is wanted."""
    with ranks.first_alone() as mine:
        if mine:
            material.own_prompts(pipeline, out)
    teacher = open_for(pipeline, out, material.all_prompts(pipeline, out))
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


def _done(stage: str, folder: Path) -> bool:
    if stage == "split":
        return all(artifact.exists(folder / branch) for branch in (LOW, HIGH))
    return artifact.exists(folder)


def _trajectory(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, start, parents = pipeline.trajectory, teacher.pipe.transformer, []
    if pipeline.start:
        start, parents = students.read(pipeline.roles, teacher, Path(pipeline.start)), [artifact.read(Path(pipeline.start))]
    with timed(out, "trajectories"):
        stored = material.stored(pipeline, out, teacher)
    with timed(out, "trajectory"):
        work = out / "work" / "trajectory"
        reads = encoders.dropout(pipeline.encoders, teacher.layout, config.seed)
        trained = trajectory.run(config, start, stored, teacher.near, work, out / METRICS, pipeline.roles, reads)
    images = _whole(config.images, config.batch)
    made = students.record("student_trajectory", pipeline, teacher, config, *parents, images=images)
    whole = roles.gathered(trained)
    with ranks.first_alone() as mine:
        if mine:
            students.write(out / FOLDER["trajectory"], made, teacher, whole)


def _distribution(pipeline: Distillation, out: Path, teacher: Teacher) -> None:
    config, first = pipeline.distribution, out / FOLDER["trajectory"]
    parent = artifact.read(first, "student_trajectory")
    with timed(out, "distribution"):
        learned_from = material.given(pipeline, out, teacher, teacher.pipe.transformer, config.seed)
        start = students.read(pipeline.roles, teacher, first)
        state = refinement.run(config, start, learned_from, out / "work" / "distribution", out / METRICS)
    made = students.record("student_distribution", pipeline, teacher, config, parent, images=state.images)
    proxy, student = roles.gathered(state.proxy), roles.gathered(state.students["student"])
    with ranks.first_alone() as mine:
        if mine:
            with whole_folder(out / PROXY) as partial:
                students.write_proxy(partial, proxy)
            students.write(out / FOLDER["distribution"], made, teacher, student)


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
        learned_from = material.given(pipeline, out, teacher, proxy, config.seed)
        start = students.read(pipeline.roles, teacher, before)
        state = split.run(config, pipeline.distribution, start, learned_from, out / "work" / "split", out / METRICS)
    kinds: dict[str, artifact.Kind] = {LOW: "student_low", HIGH: "student_high"}
    branches = {name: roles.gathered(network) for name, network in state.students.items()}
    with ranks.first_alone() as mine:
        for name, network in branches.items() if mine else ():
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
    folders = {name: out / FOLDER["split"] / name for name in (LOW, HIGH)}
    parents = [artifact.read(folders[LOW], "student_low"), artifact.read(folders[HIGH], "student_high")]
    branches = {name: students.read(pipeline.roles, teacher, folder) for name, folder in folders.items()}
    with timed(out, "merge"):
        score = assess.chooser(pipeline, material.own_prompts(pipeline, out), teacher, out / "work" / "merge")
        made_of, scores = "+".join(p.weights for p in parents), {}
        for name, velocity in _candidates(pipeline, teacher, start, branches):
            scores[name] = score(evaluate.Arm(name, pipeline.grid, 1.0, velocity, made_of))
        chosen = merge.choose(config, scores)
    what, asked = "strict", f"{config.per_task} selection prompts a task"
    if pipeline.evaluate.benchmark == "pictures":
        what, asked = "nearness", f"{pipeline.evaluate.pictures} held-out prompts"
    kept = chosen == merge.BEFORE
    how = "kept as it was before the split" if kept else f"merged with {chosen}"
    record = students.record(
        "student",
        pipeline,
        teacher,
        config,
        *([parent] if kept else parents),
        metrics={f"select_{what}_{name}": value for name, value in scores.items()},
        note=f"{how}, chosen on {asked} x {config.seeds} seeds",
    )
    print(f"merge: {chosen} is best on selection prompts ({what} {scores[chosen]:.3f}; before it {scores[merge.BEFORE]:.3f})")
    students.write(out / FOLDER["merge"], record, teacher, _mixed(chosen, teacher, start, branches))


def _mixed(
    name: str, teacher: Teacher, start: SD3Transformer2DModel, branches: dict[str, SD3Transformer2DModel]
) -> SD3Transformer2DModel:
    """A mixture of the branches: of adapters it is one adapter on the teacher again, exactly."""
    whole, parts = not adapters.has(start), (start, branches[LOW], branches[HIGH])
    if name == merge.BEFORE:
        return start.cpu() if whole else start
    if whole:
        return merge.candidate(name, *(part.cpu() for part in parts))
    weights = adapters.combine([adapters.state(part) for part in parts], merge.shares(name))
    return adapters.attach(teacher.pipe.transformer, weights)


def _candidates(
    pipeline: Distillation, teacher: Teacher, start: SD3Transformer2DModel, branches: dict[str, SD3Transformer2DModel]
) -> Iterator[tuple[str, Velocity]]:
    """What stage `merge` measures: the mixtures, both branches kept apart, and the student before the split."""
    place = pipeline.roles.place

    def velocity(network: SD3Transformer2DModel) -> Velocity:
        return encoders.reading(pipeline.encoders, teacher.layout, sd3.velocity(network, fast_dtype(network.device)))

    for name in merge.names(pipeline.merge):
        yield name, velocity(_mixed(name, teacher, start, branches).to(place))
    on_device = {name: branch.to(place) for name, branch in branches.items()}
    both = branched(on_device, branch_at(pipeline.split.boundary))
    yield merge.BRANCHES, encoders.reading(pipeline.encoders, teacher.layout, both)
    yield merge.BEFORE, velocity(start.to(place))


def _whole(images: int, batch: int) -> int:
    """Images in whole batches."""
    return images - images % batch


def _evaluate(pipeline: Distillation, out: Path, teacher: Teacher) -> Path:
    """The pictures of all steps, all arms on the report prompts, and the report."""
    made: dict[artifact.Kind, str] = {"student_trajectory": "student_trajectory"}
    if not idle(pipeline):  # else it is the student
        made["student_distribution"] = "student_distribution"
    made["student"] = pipeline.student_name
    browser.write(pipeline, out, teacher)
    return assess.report(pipeline, material.own_prompts(pipeline, out), out, teacher, made)
