"""How good a student is: all arms on report prompts and the report, and one figure by which a candidate is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data import prompts
from fewstep.engine import artifact
from fewstep.engine.log import read_metrics
from fewstep.engine.precision import fast_dtype
from fewstep.models import sd3
from fewstep.recipes.arms import strict_overall, teacher_arms
from fewstep.recipes.layout import FOLDER, SECONDS, timed
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.teacher import Teacher
from fewstep.report import beside, page
from fewstep.stages import encoders, evaluate, pictures
from fewstep.worlds.shapes.data import to_uint8


def chooser(pipeline: Distillation, own: list[str] | None, teacher: Teacher, scratch: Path) -> Callable[[evaluate.Arm], float]:
    """What a candidate of stage `merge` scores, higher is better, on prompts that are never reported.

    The strict score on selection prompts; without a detector, the distance from the teacher on the prompts that the student
    is watched with, counted negative (ours).
    """
    config = replace(
        pipeline.evaluate, per_task=pipeline.merge.per_task, seeds=pipeline.merge.seeds, noise_seed=pipeline.merge.noise_seed
    )
    if config.benchmark == "shapes":

        def score(arm: evaluate.Arm) -> float:
            collected = evaluate.run(config, [arm], teacher.pipe, teacher.record.t5_tokens, scratch, split="select")
            return strict_overall(collected["arms"][arm.name])

        return score
    texts = prompts.held_out(own, config.pictures)
    cond, best = teacher.encode([*texts, ""]), _teachers(pipeline, teacher)[0]

    def nearness(arm: evaluate.Arm) -> float:
        drawn = pictures.run(config, [best, arm], texts, cond, teacher.latent, scratch)
        return -float(pictures.distance(drawn[arm.name].x0, drawn[best.name].x0).mean())

    return nearness


def report(
    pipeline: Distillation, own: list[str] | None, out: Path, teacher: Teacher, students: dict[artifact.Kind, str]
) -> Path:
    """All arms, and the report.

    Args:
        pipeline: the run's settings.
        own: its own prompts; None for the bundled world's.
        out: its folder.
        teacher: the teacher.
        students: names of the students that are measured, by kind, the last one the result.
    """

    def arms() -> Iterator[evaluate.Arm]:  # one student at a time: each is a whole network
        yield from _teachers(pipeline, teacher)
        for kind, name in students.items():
            folder = out / FOLDER[artifact.MAKER[kind]]
            made = artifact.read(folder, kind)
            student = sd3.load(folder, without=sd3.ENCODERS).transformer.to(pipeline.roles.place)
            network = sd3.velocity(student, fast_dtype(student.device))
            network = encoders.told(network, encoders.given(made.encoders, made.t5_tokens > 0, teacher.layout))
            yield evaluate.Arm(name, made.grid, made.guidance_scale, network, made.weights)

    if pipeline.evaluate.benchmark == "shapes":
        return _benchmark(pipeline, out, teacher, list(arms()))
    return _side_by_side(pipeline, own, out, teacher, arms())


def _teachers(pipeline: Distillation, teacher: Teacher) -> list[evaluate.Arm]:
    arms = teacher_arms(teacher.pipe, teacher.record, pipeline.teacher_steps, len(pipeline.grid) - 1)
    return arms if pipeline.evaluate.benchmark == "shapes" else [arm for arm in arms if arm.velocity is not None]


def _benchmark(pipeline: Distillation, out: Path, teacher: Teacher, arms: list[evaluate.Arm]) -> Path:
    config, folder = pipeline.evaluate, out / page.EVALUATION
    with nullcontext() if evaluate.whole(config, arms, folder) else timed(out, "evaluate"):
        collected = evaluate.run(config, arms, teacher.pipe, teacher.record.t5_tokens, folder)
    return page.write(out, collected, {"name": pipeline.name, "seconds": _seconds(out)})


def _side_by_side(
    pipeline: Distillation, own: list[str] | None, out: Path, teacher: Teacher, arms: Iterator[evaluate.Arm]
) -> Path:
    config, texts, folder = pipeline.evaluate, prompts.reported(own, pipeline.evaluate.pictures), out / page.EVALUATION
    cond = teacher.encode([*texts, ""])
    rows: list[dict[str, Any]] = []
    shown: dict[str, NDArray[np.uint8]] = {}
    best: Tensor | None = None
    for arm in arms:
        with nullcontext() if pictures.whole(config, arm, texts, teacher.latent, folder) else timed(out, "evaluate"):
            made = pictures.run(config, [arm], texts, cond, teacher.latent, folder)[arm.name]
        shown[arm.name] = to_uint8(sd3.decode(teacher.pipe, made.x0[:, 0]))
        best = made.x0 if best is None else best
        rows.append(
            {
                "name": arm.name,
                "nfe": arm.nfe,
                "guidance_scale": arm.guidance_scale,
                "seconds_per_image": made.seconds_per_image,
                "distance": pictures.estimate(pictures.distance(made.x0, best))._asdict(),
                "variety": pictures.estimate(pictures.variety(made.x0, best))._asdict(),
                "n_prompts": len(texts),
                "n_seeds": config.seeds,
            }
        )
    return beside.write(out, rows, texts, shown, {"name": pipeline.name, "seconds": _seconds(out), "grid": pipeline.grid})


def _seconds(out: Path) -> dict[str, float]:
    spent: dict[str, float] = {}
    for row in read_metrics(out / SECONDS):
        spent[row["stage"]] = spent.get(row["stage"], 0.0) + row["seconds"]
    return spent
