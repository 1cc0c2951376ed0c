"""Commands that plan, run and show distillations, and look at the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from fewstep import commands


def demo(
    minutes: float = 15.0,
    out: Path | None = None,
    recipe: Literal["shapes_4step", "shapes_2step"] = "shapes_4step",
) -> None:
    """Distil the bundled teacher on this machine and open the books: a table, and a report with pictures.

    Measures the machine first and fits the work into the minutes. The same command again goes on where a killed one
    stopped, or shows the finished result.

    Args:
        minutes: wall-clock budget on this machine; 1 makes a quick, weak student, 15 the one of the README.
        out: folder of the run; runs/demo by default (runs/demo_2step for two steps).
        recipe: which student.
    """
    from fewstep.recipes import demo as demonstration

    commands.prepare()
    folder = out or Path("runs") / ("demo" if recipe == "shapes_4step" else "demo_2step")
    demonstration.run(recipe, folder, minutes)


def run(
    recipe: tyro.conf.Positional[str],
    /,
    out: Path | None = None,
    stage: str | None = None,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = (),
    config: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Run a recipe, or one stage of it. The same command again resumes.

    Example: fewstep run shapes_4step --out runs/mine --set distribution.trajectory_weight=0.1

    Args:
        recipe: name of a recipe, see `fewstep show`.
        out: folder of the run; runs/RECIPE by default.
        stage: run only this stage; what it needs must be there.
        set: change one setting, section.key=value; may be given several times.
        config: YAML file of settings, such as a run's resolved.yaml; --set comes on top.
        dry_run: print settings, stages and budgets, and stop.
    """
    from fewstep.recipes import demo as demonstration
    from fewstep.recipes import execute
    from fewstep.recipes import plan as planning

    pipeline = demonstration.resolve(recipe, list(set), config)
    if dry_run:
        planning.show(pipeline)
        return
    commands.prepare()
    report = execute.run(pipeline, out or Path("runs") / recipe, stage)
    if report is not None:
        demonstration.print_result(report)


def plan(
    recipe: tyro.conf.Positional[str],
    /,
    gpus: str | None = None,
    calibration: Path | None = None,
    calibrate: Path | None = None,
    tflops: float = 0.0,
    inference: bool = False,
    pixels: tuple[int, ...] = (),
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = (),
    config: Path | None = None,
) -> None:
    """Say what a recipe takes before anything is trained: time on this machine or another one, and memory on GPUs.

    With --gpus no model is loaded: weights are counted, and what a network keeps for the way back is recorded from a pass
    without numbers. Where a recipe does not fit, the settings that make it fit are named. Time is told by rates that
    --calibrate has measured on the machine that will train.

    With --inference: what drawing an image takes instead, part by part, in 16, 8, 6 and 4 bits, with T5 and without.

    Example: fewstep plan sd35_medium_4step_frugal --gpus 1x24

    Args:
        recipe: name of a recipe; with --inference also the folder of a model.
        gpus: number and memory in GiB, such as 1x24.
        calibration: a file that --calibrate wrote: time is told by it, and divided among --gpus.
        calibrate: measure this machine with the recipe's networks, and keep the rates in this file.
        tflops: tell time by arithmetic, for a card that sustains so many teraflops a second, such as 60.
        inference: tell the memory of drawing images.
        pixels: sides of these images; 512 and 1024 where the model knows them.
        set: change one setting, section.key=value; may be given several times.
        config: YAML file of settings.
    """
    from fewstep.recipes import demo as demonstration
    from fewstep.recipes import plan as planning

    commands.prepare()
    if inference:
        if any((gpus, calibration, calibrate, tflops, set, config)):
            raise ValueError("--inference tells of a model as it is: leave out all but --pixels")
        print(planning.inference(recipe, pixels))
        return
    pipeline = demonstration.resolve(recipe, list(set), config)
    planning.show(pipeline)
    planning.costs(pipeline, gpus, calibration, calibrate, tflops)


def cache(
    recipe: tyro.conf.Positional[str],
    /,
    out: Path | None = None,
    check: bool = False,
    mend: bool = False,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = (),
    config: Path | None = None,
) -> None:
    """Make what a recipe learns from beforehand: text conditions and teacher trajectories. The same command resumes.

    `fewstep run` with the same settings and --out then goes on from there, with text encoders never opened. Under torchrun
    processes share the work. Says how much disk it takes before it begins, and refuses where there is less.

    Example: fewstep cache sd35_medium_4step_frugal --out runs/mine

    Args:
        recipe: name of a recipe.
        out: folder of the run; runs/RECIPE by default.
        check: only compare the files with their hashes, for instance after they were copied; code 1 if something is wrong.
        mend: with --check, delete what is damaged, so that it is made again.
        set: change one setting, section.key=value; may be given several times.
        config: YAML file of settings.
    """
    from fewstep.recipes import cache as caching
    from fewstep.recipes import demo as demonstration
    from fewstep.recipes.pipeline import Distillation

    folder = out or Path("runs") / recipe
    if check:
        found = caching.check(folder, mend)
        print("\n".join(found) or f"{folder}: every file is as it was written")
        if found:
            raise SystemExit(1)
        return
    pipeline = demonstration.resolve(recipe, list(set), config)
    if not isinstance(pipeline, Distillation):
        raise ValueError(f"{recipe} learns from scenes that are drawn as they are needed: there is nothing to cache")
    commands.prepare()
    print(caching.run(pipeline, folder))


def show(path: tyro.conf.Positional[Path | None] = None, /) -> None:
    """Show an artefact or a run; without a path, the recipes and the models that come with fewstep.

    Args:
        path: a model folder with an artifact.json, or a run's folder.
    """
    from fewstep.recipes import demo as demonstration

    demonstration.show(path)


def doctor(
    out: Path = Path("runs"),
    eval: bool = False,
    sidecar: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COMMAND"), tyro.conf.UseAppendAction] = (),
    weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FOLDER"), tyro.conf.UseAppendAction] = (),
) -> None:
    """Look at this machine: environment, torch build, GPUs, memory, disk, hub login; then draw and check a few images.

    With --eval: let every metric test itself instead. A metric that is here and wrong is red; what is absent is said with
    what installs it.

    Every finding that needs a hand comes with what mends it. Ends with code 1 when something hinders everything, or a metric
    is wrong. Stays offline.

    Args:
        out: where runs are to be written.
        eval: test the metrics.
        sidecar: with --eval, command of an evaluator in an environment of its own; may be given several times.
        weights: with --eval, where a metric's weights lie; may be given several times.
    """
    if (sidecar or weights) and not eval:
        raise ValueError("--sidecar and --weights belong to --eval")
    commands.prepare()
    if eval:
        from fewstep.recipes import doctor_eval

        if not doctor_eval.run(sidecar, weights):
            raise SystemExit(1)
        return
    from fewstep.recipes import doctor as surgery

    if not surgery.run(out):
        raise SystemExit(1)
