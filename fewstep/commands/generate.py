"""Commands that draw: images from prompts, and an image again from its own file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

from fewstep import commands
from fewstep.engine import loading

SHOWN = 8  # paths that are printed


def generate(
    prompt: tyro.conf.Positional[str] = "",
    /,
    prompts: str = "",
    model: str = "bundled",
    n: int = 1,
    seed: int = 0,
    size: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    out: Path = Path("runs/images"),
    batch: int = 8,
    metadata: bool = True,
    format: Literal["png"] = "png",
    teacher: Path | None = None,
    base: Path | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    cache: Path | None = None,
    compile: bool = False,
) -> None:
    """Draw images with a teacher, a student or an export, on the grid and with the guidance that it was made for.

    Examples: fewstep generate "a red circle left of a blue square" --n 4
              fewstep generate --prompts prompts.txt --model runs/demo/05-merge
              cat prompts.txt | fewstep generate --prompts -

    Images lie in a folder for each day, beside log.html, which shows them with what they were made with. A PNG says the same
    of itself, and `fewstep replay` makes it again. The same command draws only what is missing.

    Args:
        prompt: what to draw.
        prompts: file of prompts instead (text, CSV, JSON lines, Parquet), or - for lines of the standard input.
        model: folder of a model; "bundled" is the bundled student, "teacher" its teacher.
        n: images of each prompt, with seeds seed, seed + 1 and so on.
        seed: of the first image of each prompt.
        size: WIDTHxHEIGHT in pixels; the model's own by default.
        steps: the model's own by default; a student has no others.
        guidance: scale of guidance; the model's own by default, 1 is off.
        negative: what guidance leads away from.
        out: folder of the days' folders.
        batch: images that are drawn together; an image is the same in any batch.
        metadata: write into an image how it was made; --no-metadata leaves it out.
        format: of the files.
        teacher: folder of the teacher, for a LoRA.
        base: folder of the student that an export was made of, where that does not hold all parts.
        dtype: that the model computes in.
        device: such as cpu or cuda:0.
        cache: folder in which text conditions are kept, so that a known prompt needs no text encoder.
        compile: compile the denoiser first, which takes a minute or more: fewer calls on a GPU; on a CPU often no faster.
    """
    with loading.libraries():
        from fewstep.recipes import generate as drawing
        from fewstep.serve.contract import ADDRESSES
        from fewstep.serve.engine import Ask, open_engine

    commands.prepare()
    texts, (width, height) = drawing.prompts_of(prompt, prompts, sys.stdin), drawing.size_of(size)
    if n < 1:
        raise ValueError(f"--n {n}: give 1 or more")
    if 0 <= seed < ADDRESSES < seed + n:
        raise ValueError(f"--seed {seed} --n {n}: seeds end at 2^63 - 1; give a smaller --seed or --n")
    if cache is not None:
        drawing.make_folder(cache, f"--cache {cache}")
    engine = open_engine(
        model, teacher=teacher, base=base, dtype=dtype, device=device, cache=cache, compiled=compile
    )
    asks = [Ask(text, seed + k, 0, negative, steps, guidance, width, height) for text in texts for k in range(n)]
    print(drawing.effective(engine, engine.resolve(asks[0])[0]))
    made = drawing.draw(engine, asks, out, batch=batch, told=metadata)
    for line in (*made.warnings, *engine.notes):
        print(f"note: {line}", file=sys.stderr)
    for path in made.paths[:SHOWN]:
        print(path)
    if len(made.paths) > SHOWN:
        print(f"and {len(made.paths) - SHOWN} more")
    there = len(made.paths) - made.new
    if made.new:
        parts = ", ".join(f"{part} {1000 * value:.0f} ms" for part, value in made.parts.items())
        print(f"{made.new} drawn in {made.seconds:.2f} s (an image: {parts}){f'; {there} were there' if there else ''}")
        print(made.log)
    else:
        print(f"nothing to draw: all {there} are there")


def replay(
    image: tyro.conf.Positional[Path],
    /,
    model: str | None = None,
    teacher: Path | None = None,
    base: Path | None = None,
) -> None:
    """Draw an image again from what its PNG says, and compare: the largest difference, and what could explain one.

    Ends with code 1 if any value differs.

    Example: fewstep replay runs/images/2026-01-31/a-red-circle-0-1a2b3c4d.png

    Args:
        image: a PNG of `fewstep generate` or `fewstep serve`.
        model: folder of the model that drew it; the bundled ones are known.
        teacher: folder of the teacher, for a LoRA.
        base: folder of the student that an export was made of.
    """
    with loading.libraries():
        from fewstep.recipes import generate as drawing

    commands.prepare()
    found = drawing.replay(image, model, teacher, base)
    print(drawing.show(found))
    if found.largest:
        raise SystemExit(1)
