"""What a run learns from: prompts, the teacher's trajectories, and those that it is watched with."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from diffusers import SD3Transformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.data import prompt_files, prompts, trajectories
from fewstep.engine import artifact, files, health
from fewstep.flow import Velocity
from fewstep.models import sd3
from fewstep.recipes.layout import PROMPTS
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.teacher import Teacher, folder_of, velocity_of
from fewstep.stages import distribution, encoders, watch
from fewstep.worlds.shapes.data import to_uint8

AT_ONCE = 2**20  # numbers in the states that a GPU is given at once, where they are small
HELD_OUT_SEED = 500  # added to the seed of the trajectories: their noise is not that of the held-out ones


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
    texts, said = usable(pipeline)
    for sentence in said:
        print(f"prompts: {sentence}", file=sys.stderr)
    record = {"from": pipeline.prompts, "said": said, "prompts": texts}
    files.write(kept, json.dumps(record, ensure_ascii=False, indent=1))
    return texts


def usable(pipeline: Distillation) -> tuple[list[str], list[str]]:
    """The prompts of a file that can be used, and what is said of the others; none for the bundled world's.

    Raises:
        ValueError: as `prompt_files.read` and `prompt_files.usable`.
    """
    if pipeline.prompts == "shapes":
        return [], []
    folder = folder_of(pipeline)
    fits = sd3.reads_to_the_end(folder, artifact.read(folder, "teacher").t5_tokens)
    return prompt_files.usable(prompt_files.read(Path(pipeline.prompts)), fits, pipeline.prompt_policy)


def all_prompts(pipeline: Distillation, out: Path) -> Iterator[str]:
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


def stored(pipeline: Distillation, out: Path, teacher: Teacher) -> trajectories.Trajectories:
    """The teacher trajectories of a run; made now if they are not there, by its `data_teacher` if it has one."""
    config, place = pipeline.trajectory, pipeline.roles.place
    trajectories.write(
        out / "trajectories",
        _maker(pipeline, teacher),
        teacher.near,
        prompts.source(own_prompts(pipeline, out), config.seed),
        grid=pipeline.grid,
        latent_shape=teacher.latent,
        count=config.trajectories,
        substeps=config.teacher_substeps,
        solver=config.teacher_solver,
        seed=config.seed,
        device=place,
        together=1 if place.type == "cpu" else max(1, AT_ONCE // math.prod(teacher.latent) // trajectories.SHARD),
    )
    return trajectories.read(out / "trajectories", config.trajectories, pipeline.grid).beside(place)


def _maker(pipeline: Distillation, teacher: Teacher) -> Velocity:
    """Who makes the trajectories; another teacher is opened when the first of them is made."""
    if not pipeline.data_teacher:
        return teacher.velocity
    opened: list[Velocity] = []

    def call(x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        if not opened:
            at_once = 2 * pipeline.distribution.micro_batch
            opened.append(velocity_of(Path(pipeline.data_teacher), pipeline.roles, teacher.encode, at_once))
        return opened[0](x_t, t, cond)

    return call


def given(pipeline: Distillation, out: Path, teacher: Teacher, proxy: SD3Transformer2DModel, seed: int) -> distribution.Given:
    """What a refinement learns from and is watched with; the trajectories are made now if they are not there."""
    made, watched = stored(pipeline, out, teacher), held_out(pipeline, out, teacher)
    prompt_at = prompts.source(own_prompts(pipeline, out), seed)
    reads = encoders.dropout(pipeline.encoders, teacher.layout, seed)
    always = encoders.given(pipeline.encoders.encoders, pipeline.encoders.padded, teacher.layout)
    return distribution.Given(
        proxy, teacher.velocity, made, teacher.near, prompt_at, watched, pipeline.roles, reads, always
    )


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
        solver=pipeline.trajectory.teacher_solver,
        seed=pipeline.trajectory.seed + HELD_OUT_SEED,
        title="held-out trajectories",
    )
    made = trajectories.read(folder, count, pipeline.grid)

    def decode(x0: Tensor) -> NDArray[np.uint8]:
        return to_uint8(sd3.decode(teacher.pipe, x0))

    return watch.HeldOut(made, teacher.encode(made.prompts), config.seeds, decode, out / health.PICTURES)
