"""The command `fewstep`. Heavy imports happen inside the commands, so that `--help` answers at once (D14)."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro
from safetensors import SafetensorError

from fewstep.recipes import RECIPES

app = tyro.extras.SubcommandApp()
RECIPE_HELP = "; ".join(f"{name}: {purpose}" for name, purpose in RECIPES.items())


def _prepare() -> None:
    """All cores, no advice of libraries that a user cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")  # peft's merging, which is not used
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from fewstep.engine import ranks

    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    ranks.begin()


@app.command
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

    _prepare()
    folder = out or Path("runs") / ("demo" if recipe == "shapes_4step" else "demo_2step")
    demonstration.run(recipe, folder, minutes)


@app.command
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
    _prepare()
    report = execute.run(pipeline, out or Path("runs") / recipe, stage)
    if report is not None:
        demonstration.print_result(report)


@app.command
def plan(
    recipe: tyro.conf.Positional[str],
    /,
    gpus: str | None = None,
    calibration: Path | None = None,
    calibrate: Path | None = None,
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
        inference: tell the memory of drawing images.
        pixels: sides of these images; 512 and 1024 where the model knows them.
        set: change one setting, section.key=value; may be given several times.
        config: YAML file of settings.
    """
    from fewstep.recipes import demo as demonstration
    from fewstep.recipes import plan as planning

    _prepare()
    if inference:
        print(planning.inference(recipe, pixels))
        return
    pipeline = demonstration.resolve(recipe, list(set), config)
    planning.show(pipeline)
    planning.costs(pipeline, gpus, calibration, calibrate)


@app.command
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
    _prepare()
    print(caching.run(pipeline, folder))


@app.command
def show(path: tyro.conf.Positional[Path | None] = None, /) -> None:
    """Show an artefact or a run; without a path, the recipes and the models that come with fewstep.

    Args:
        path: a model folder with an artifact.json, or a run's folder.
    """
    from fewstep.recipes import demo as demonstration

    demonstration.show(path)


@app.command
def adopt(
    source: tyro.conf.Positional[str],
    /,
    out: Path,
    base: str | None = None,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    guidance_scale: float = 4.5,
    steps: int = 28,
    t5_tokens: int = 256,
) -> None:
    """Make a teacher of an SD3 or SD3.5 model of your own: a hub id, a diffusers folder, or a single safetensors file.

    For example: fewstep adopt stabilityai/stable-diffusion-3.5-medium --out runs/teachers/medium

    Nothing is trained. Gated models need their licence accepted and `hf auth login`. Recipes take the folder as
    `--set teacher=DIR`; those of SD3.5 look in runs/teachers/sd35_medium and runs/teachers/sd35_large by themselves.

    Args:
        source: hub id, folder, or file.
        out: folder of the teacher.
        base: for a single file: hub id or folder that has what it lacks (text encoders, tokenizers, configurations).
        lora: LoRA to merge into the weights.
        lora_scale: how strongly.
        guidance_scale: that the teacher is sampled with.
        steps: that it is sampled with.
        t5_tokens: how many tokens of a prompt T5 reads.
    """
    from fewstep.recipes import adopt as adoption

    _prepare()
    made = adoption.run(
        source,
        out,
        base=base,
        lora=lora,
        lora_scale=lora_scale,
        guidance_scale=guidance_scale,
        steps=steps,
        t5_tokens=t5_tokens,
    )
    print(f"{out} is a teacher: {len(made.grid) - 1} steps, guidance {made.guidance_scale:g}, weights {made.weights[:12]}")


@app.command(name="lora-check")
def lora_check(
    student: tyro.conf.Positional[Path],
    lora: tyro.conf.Positional[Path],
    /,
    out: Path = Path("runs/lora_check"),
    teacher: Path | None = None,
    scale: float = 1.0,
    prompts: Path | None = None,
    count: int = 12,
    seeds: int = 2,
    resolution: int = 0,
) -> None:
    """Measure how much of a LoRA that was trained on the teacher survives in its student, and show it.

    Draws the same prompts and noise with both, without and with the LoRA.

    Example: fewstep lora-check runs/mine/05-merge style.safetensors --teacher runs/teachers/sd35_medium

    Args:
        student: folder of a student, such as runs/demo/05-merge.
        lora: LoRA of its teacher, a safetensors file.
        out: folder of the picture and the figures.
        teacher: folder of the student's teacher; the bundled one by default.
        scale: how strongly the LoRA is merged.
        prompts: file of prompts; those of the bundled world by default.
        count: prompts that are drawn.
        seeds: images of each.
        resolution: pixels of an image's side; the student's own by default.
    """
    from fewstep.recipes import lora_check as check

    _prepare()
    made = check.run(
        student,
        lora,
        out,
        teacher=teacher,
        scale=scale,
        prompt_file=prompts,
        count=count,
        seeds=seeds,
        resolution=resolution,
    )
    kept, cosine = made["kept"], made["cosine"]
    assert isinstance(kept, dict) and isinstance(cosine, dict)
    interval = f"95 % interval {100 * kept['lo']:.0f} to {100 * kept['hi']:.0f}"
    asked = f"{made['n_prompts']} prompts x {made['n_seeds']} seeds"
    print(f"{100 * kept['mean']:.0f} % of the LoRA's effect survives ({interval}; {asked})")
    print(f"cosine {cosine['mean']:.2f} ({cosine['lo']:.2f} to {cosine['hi']:.2f})\n{out / check.PICTURE}")


@app.command
def encoders(
    student: tyro.conf.Positional[str] = "bundled",
    /,
    keep: str | None = None,
    out: Path = Path("runs/encoders"),
    prompts: Path | None = None,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = (),
) -> None:
    """Measure what a student loses without each of its text encoders, and what that saves; with --keep, write it without them.

    T5 is the largest by far, and SD3 learned to do without any encoder. A student loses less if it met that while it was
    distilled: --set encoders.drop_t5=0.5 of `fewstep run`.

    Example: fewstep encoders runs/demo/05-merge --keep clip_l,clip_g --out runs/without_t5

    Args:
        student: folder of a student; the bundled one by default.
        keep: encoders to keep, of clip_l, clip_g and t5, separated by commas; without it every subset is measured.
        out: folder of the figures, and of the student with --keep.
        prompts: file of prompts to compare images with, for a model of your own.
        set: how much is asked: per_task, seeds, pictures.
    """
    from fewstep.engine.config import override
    from fewstep.recipes import encoders as texts
    from fewstep.stages import gate

    _prepare()
    limits = override(gate.Config(), list(set))
    names = tuple(keep.split(",")) if keep is not None else ()
    rows = texts.run(student, out, [names] if keep is not None else texts.every(student), limits, prompts)
    print(texts.show(rows))
    if keep is not None:
        texts.keep(student, names, out / "student")
        print(out / "student")


@app.command
def export(
    student: tyro.conf.Positional[str] = "bundled",
    /,
    to: Literal["diffusers", "torchao", "single", "lora", "gguf", "onnx", "openvino", "coreml"] = "torchao",
    bits: int | None = None,
    average: float = 0.0,
    recover: int = 0,
    dynamic: bool = False,
    text_bits: int = 16,
    pixels: int = 0,
    rank: float = 64,
    out: Path | None = None,
    teacher: Path | None = None,
    prompts: Path | None = None,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = (),
) -> None:
    """Write a student for whoever runs it, in 16, 8, 6 or 4 bits, and measure what that cost.

    What is written is opened again by its own runtime and compared with the student on the same prompts and noise: score,
    nearness of images, size, memory, time. Ends with code 1 if it loses more than the recipe's gate allows; it is then
    written all the same, and marked as failed.

    Example: fewstep export runs/demo/05-merge --to gguf --bits 6 --out runs/export/gguf6

    Args:
        student: folder of a student; the bundled one by default.
        to: diffusers (folder), torchao (folder in 8 bits, for diffusers), single (file for ComfyUI), lora (difference from the
            teacher), gguf, onnx, openvino, or coreml.
        bits: of the denoiser's matrices; 8 where the format has them, else 16.
        average: bits of an average matrix, such as 6, spent where they matter most, instead of one width for all.
        recover: samples of training that make up for the rounding, such as 20000.
        dynamic: of torchao: round what comes into a product, too.
        text_bits: of the text encoders (torchao: 8; gguf: T5 in 8, 6 or 4).
        pixels: longest side of images that will be drawn; the position table is cut to it.
        rank: of a LoRA: a whole number, or a share of each matrix's change such as 0.9.
        out: folder; runs/export/FORMAT-BITS by default.
        teacher: folder of the student's teacher, for a LoRA; the bundled one is known.
        prompts: file of prompts to compare images with, for a model of your own.
        set: a limit of the gate or a setting of rounding, such as gate.loss_6=2 or quantize.seed=3.
    """
    from fewstep.recipes import export as exporting

    _prepare()
    settings, limits = exporting.resolve(
        student, to, bits, average, recover, dynamic, text_bits, pixels, rank, list(set)
    )
    place = out or Path("runs/export") / exporting.name_of(settings)
    found = exporting.run(settings, exporting.open_source(student, teacher), place, limits, prompts)
    print(exporting.show(place, found))
    if found["failed"]:
        raise SystemExit(1)


@app.command
def doctor(out: Path = Path("runs")) -> None:
    """Look at this machine: environment, torch build, GPUs, memory, disk, hub login; then draw and check a few images.

    Every finding that needs a hand comes with what mends it. Ends with code 1 when something hinders everything. Stays
    offline.

    Args:
        out: where runs are to be written.
    """
    from fewstep.recipes import doctor as surgery

    _prepare()
    if not surgery.run(out):
        raise SystemExit(1)


def main() -> None:
    """Entry point. What a user can cause ends in one line and exit code 2; `FEWSTEP_DEBUG=1` shows the traceback."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")  # advice on image processors is not for our users
    for name in ("torchao", "torch.utils._pytree"):  # nor what could not be loaded, and works without
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app.cli(prog="fewstep", description="Turn a slow flow model into a few-step one. Recipes: " + RECIPE_HELP)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:  # a full disk is the last
        if os.environ.get("FEWSTEP_DEBUG"):
            raise
        print(f"fewstep: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not os.environ.get("WORLD_SIZE") or os.environ.get("FEWSTEP_DEBUG") or "onnection" not in str(error):
            raise
        said = "fewstep: another process of this run has ended; the same command goes on from the last checkpoint"
        print(said, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("fewstep: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if os.environ.get("WORLD_SIZE"):  # started by torchrun: a process that stays in the group may not end
            from fewstep.engine import ranks

            ranks.end()


if __name__ == "__main__":
    main()
