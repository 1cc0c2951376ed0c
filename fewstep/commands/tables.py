"""Commands that put figures side by side: what a model takes, tables of arms, and a run's pictures from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from fewstep import commands


def measure(
    model: tyro.conf.Positional[str] = "bundled",
    /,
    runs: int = 30,
    steps: int | None = None,
    guidance: float | None = None,
    pixels: int | None = None,
    reference: str | None = None,
    base: Path | None = None,
    teacher: Path | None = None,
    limit: float = 30.0,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Measure what drawing an image takes, text encoders and decoding included: time, memory, disk.

    The model is opened in a fresh process and draws one image at a time, each of a new prompt. The same images are drawn with
    the reference, and their PSNR stands beside the speed: a model that draws other images is no faster way to the same ones.

    Example: fewstep measure runs/export/bundled-torchao-8

    Args:
        model: folder of a teacher, a student or an export; "bundled" is the student, "teacher" the teacher that come along.
        runs: images that are timed, after the first one and a warm-up of three.
        steps: of the grid; the model's own by default.
        guidance: scale of guidance; the model's own by default.
        pixels: side of the image; the model's own by default.
        reference: model whose images these should be; by default the student that an export was made of, and for all else
            the model itself in float32.
        base: of an export: the student that it was made of; the bundled one is known.
        teacher: folder of the teacher, for a LoRA.
        limit: median PSNR in dB below which they are called different images.
        dtype: that the model computes in.
        device: such as cpu or cuda; auto is the GPU if there is one.
        out: folder of system.json; runs/measure/MODEL by default.
    """
    from math import isfinite

    from fewstep.recipes import system

    if not isfinite(limit):
        raise ValueError(f"--limit {limit}: give a number of dB, such as {system.SAME:g}")
    commands.prepare()
    found = system.run(model, runs, steps, guidance, pixels, reference, dtype, device, limit, base, teacher)
    place = (out or Path("runs/measure") / found["name"].replace("/", "-")) / system.RECORD
    system.write(place, found)
    print(f"{system.show(found)}\n{place}")


def tables(
    sets: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    out: Path = Path("runs/tables"),
    models: tuple[str, ...] = (),
    system: tuple[Path, ...] = (),
    ablation: Path | None = None,
    study: Path | None = None,
    protocol: str = "shapes",
    per_task: int | None = None,
    seeds: int | None = None,
    runs: int = 30,
    size: Literal["memory", "disk"] = "memory",
) -> None:
    """Make the tables of a paper: quality, system and ablation, and the figure of rating or score against latency.

    Arms are sets of images with their scores; models are drawn, scored and measured first. All must answer one protocol.

    Example: fewstep tables --models teacher bundled --out runs/tables

    Args:
        sets: folders of image sets that `fewstep eval` has scored, or their scores.json, or models.
        out: folder of tables.html, .md, .csv, .json and the figure.
        models: models to draw, score and measure, such as teacher, bundled or a folder.
        system: files that `fewstep measure` wrote.
        ablation: numbers of an ablation, such as benchmarks/results/ablation.json.
        study: report.json of a study of people: ratings take the place of scores in the figure.
        protocol: that models are scored on, by name or file.
        per_task: prompts of each task, where models are scored; the protocol's own by default.
        seeds: images of each prompt, likewise.
        runs: timed images of each model.
        size: what the area of a bubble shows.
    """
    from fewstep.recipes import tables as tabulating

    commands.prepare()
    made = tabulating.run(sets, out, models, system, ablation, study, tabulating.Asked(protocol, per_task, seeds, runs), size)
    print(made)


def browse(run: tyro.conf.Positional[Path], /) -> None:
    """Write the page of a run that shows the same prompts and seeds before training, at every look and after every stage.

    The teacher's images from the same noise stand beside them. The page opens from disk and needs no server. Every run writes
    it at its end; while one is going on, this shows what it has looked at so far. What no look has seen is drawn.

    Args:
        run: folder of the run.
    """
    from fewstep.recipes import browser

    commands.prepare()
    print(browser.of_run(run))
