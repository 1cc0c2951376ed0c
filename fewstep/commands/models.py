"""Commands on models: where a teacher comes from, what a student loses, and the forms it is shipped in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from fewstep import commands


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

    commands.prepare()
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

    commands.prepare()
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

    commands.prepare()
    limits = override(gate.Config(), list(set))
    names = tuple(keep.split(",")) if keep is not None else ()
    if keep is not None:  # first, because it is quick to refuse
        texts.keep(student, names, out / "student")
    rows = texts.run(student, out, [names] if keep is not None else texts.every(student), limits, prompts)
    print(texts.show(rows))
    if keep is not None:
        print(out / "student")


def export(
    student: tyro.conf.Positional[str] = "bundled",
    /,
    to: Literal["diffusers", "torchao", "single", "lora", "gguf", "onnx", "openvino", "coreml"] = "torchao",
    bits: int | None = None,
    average: float = 0.0,
    recover: int = 0,
    dynamic: bool = False,
    beforehand: bool = False,
    text_bits: int = 16,
    pixels: int = 0,
    parts: str = "",
    rank: str = "64",
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
        beforehand: of diffusers: computes what looks only at time and prompt first, and lets those weights go.
        text_bits: of the text encoders (torchao: 8; gguf: T5 in 8, 6 or 4).
        pixels: longest side of images that will be drawn: the position table is cut to it, or left whole.
        parts: of onnx, openvino and coreml: what is written, of denoiser, decoder, clip_l, clip_g, t5; by default what the
            student reads, of coreml denoiser,decoder.
        rank: of a LoRA: a whole number, or a share of each matrix's change such as 0.9.
        out: folder; runs/export/STUDENT-FORMAT-BITS by default.
        teacher: folder of the student's teacher, for a LoRA; the bundled one is known.
        prompts: file of prompts, for a model of your own: a tenth to choose widths and to compare images by, the others for
            --recover.
        set: a limit of the gate or a setting of rounding, such as gate.loss_6=2 or quantize.seed=3.
    """
    from fewstep.recipes import export as exporting

    commands.prepare()
    wanted = tuple(filter(None, parts.split(",")))
    settings, limits = exporting.resolve(
        student, to, bits, average, recover, dynamic, beforehand, text_bits, pixels, wanted, rank, list(set)
    )
    place = out or Path("runs/export") / exporting.name_of(settings, student)
    found = exporting.run(settings, exporting.open_source(student, teacher), place, limits, prompts)
    print(exporting.show(place, found))
    if found["failed"]:
        raise SystemExit(1)
