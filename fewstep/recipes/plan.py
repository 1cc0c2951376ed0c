"""`fewstep plan`: what a recipe is, and what it takes of time and memory, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from fewstep.engine import artifact, ranks
from fewstep.engine.config import to_dict
from fewstep.engine.log import clock
from fewstep.models import sd3
from fewstep.recipes import RECIPES, budget, distil, footprint, memory, teacher
from fewstep.recipes.pipeline import Distillation, Pipeline
from fewstep.stages import trajectory
from fewstep.worlds.shapes import STUDENT_4

ALONE = ("health", "merge", "evaluate")  # parts that more GPUs do not shorten: one process does them, or all do the same


def show(pipeline: Pipeline) -> None:
    """Print the resolved settings, the stages and their budgets."""
    print(yaml.safe_dump(to_dict(pipeline), sort_keys=False).rstrip())
    print(f"\nstages: {' -> '.join(pipeline.stages)}")
    if not isinstance(pipeline, Distillation):
        images = sum(p.images for p in pipeline.autoencoder.phases)
        print(f"autoencoder   {images:>10,} images\nteacher       {pipeline.teacher.images:>10,} images")
        return
    t, d, e, steps = pipeline.trajectory, pipeline.distribution, pipeline.evaluate, len(pipeline.grid) - 1
    print(f"trajectory    {t.trajectories:>10,} teacher trajectories of {trajectory.evaluations(t, steps)} evaluations")
    print(f"              {t.images:>10,} student steps in {t.images // t.batch:,} updates")
    updates = f"{d.images // d.batch:,} updates, {d.proxy_updates} of the proxy each"
    print(f"distribution  {d.images:>10,} student samples in {updates}")
    reason = distil.idle(pipeline)
    if reason:
        print(f"split, merge  nothing: {reason}")
    else:
        count = pipeline.split.images
        print(f"split         {count:>10,} student samples in {count // d.batch:,} updates of two branches in turn")
        on = {"shapes": f"{pipeline.merge.per_task} selection prompts a task", "pictures": f"{e.pictures} held-out prompts"}
        print(f"merge         {len(pipeline.merge.ratios)} ratios on {on[e.benchmark]}")
    asked = f"{e.per_task:>10,} prompts a task" if e.benchmark == "shapes" else f"{e.pictures:>10,} prompts, side by side"
    print(f"evaluate      {asked}, {e.seeds} seeds")


def costs(
    pipeline: Pipeline, gpus: str | None, calibration: Path | None, calibrate: Path | None, tflops: float = 0.0
) -> None:
    """Print what a recipe takes.

    Args:
        pipeline: a recipe's settings.
        gpus: of such a GPU's memory.
        calibration: time, by rates that were measured somewhere. Without it and `gpus` this machine is measured.
        calibrate: measure this machine, and keep the rates in this file.
        tflops: time, by arithmetic, on a card that sustains so many; 0 is not asked for.

    Raises:
        ValueError: not a distillation, a file that holds no rates, or `gpus` as in `memory.report`.
    """
    if ranks.count() > 1:
        raise ValueError("a plan is made by one process: start it without torchrun")
    if sum(map(bool, (calibration, calibrate, tflops))) > 1:
        raise ValueError("give one of --calibrate, which measures, --calibration, which reads what was measured, and --tflops")
    if not isinstance(pipeline, Distillation):
        if gpus or calibration or calibrate or tflops:
            raise ValueError("only distillations have costs to be planned; give the recipe of a distillation")
        return
    if gpus:
        print(f"\n{memory.report(pipeline, gpus)}")
    speed = budget.read(calibration, pipeline) if calibration else None
    speed = budget.counted(pipeline, tflops) if tflops else speed
    small = pipeline.evaluate.benchmark == "shapes"
    if calibrate or (speed is None and gpus is None and small):
        speed = _measured(pipeline)
    if calibrate and speed:
        budget.write(calibrate, speed)
        print(f"\nrates of {speed.where} are kept in {calibrate}")
    if speed is None:
        more = "" if gpus else "memory: --gpus 1x24. "
        print(f"\n{more}Time: --calibration FILE, with a file that --calibrate FILE wrote on the machine that will train;")
        print("or by arithmetic, --tflops 60, with what the card sustains")
        return
    count = memory.parse(gpus)[0] if gpus else 1
    spent = {part: took / (1 if part in ALONE else count) for part, took in budget.seconds(pipeline, speed).items()}
    print(f"\nestimated on {f'{count} x ' if count > 1 else ''}{speed.where}")
    for part, seconds in {**spent, "in all": sum(spent.values())}.items():
        print(f"{part:<14}{clock(seconds):>10}")
    if not small:
        print("besides what text encoders take, once for each prompt")


def _measured(pipeline: Distillation) -> budget.Speed:
    folder = teacher.folder_of(pipeline)
    record = artifact.read(folder, "teacher")
    try:
        return budget.measure(teacher.open_networks(folder, pipeline.roles, sd3.ENCODERS), pipeline, record.t5_tokens)
    except torch.OutOfMemoryError:
        raise ValueError("there is not enough memory to measure this recipe here: --gpus says what would make it fit") from None


def inference(model: str, pixels: tuple[int, ...] = ()) -> str:
    """What drawing an image takes of memory, as printed.

    Args:
        model: a recipe, whose student is meant, or a model's folder.
        pixels: sides of images; empty: the usual ones.

    Raises:
        ValueError: neither, or a size that the model does not know.
    """
    sizes = [name for name in footprint.FULL_SIZE if model in RECIPES and model.startswith(f"sd35_{name}")]
    source: str | Path = sizes[0] if sizes else Path(model)
    if not sizes and model in RECIPES:
        source = STUDENT_4
    elif not sizes and not Path(model).is_dir():
        raise ValueError(f"{model} is neither a recipe nor a model's folder; recipes: {', '.join(RECIPES)}")
    parts, rows = footprint.components(source), footprint.table(source, pixels)
    told = footprint.show(rows, parts)
    return f"{told}\n\n{footprint.readings(rows, parts)}" if source == "medium" else told
