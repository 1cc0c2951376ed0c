"""`fewstep lora-check`: how much of a LoRA's effect on the teacher survives in its student. The measure is ours.

A LoRA that was trained on the base moves the base's images. From the same prompts and noise, the student's images are moved,
too; the part of that movement that goes where the base's goes is what survives.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data import prompt_files, prompts
from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.engine.precision import fast_dtype
from fewstep.models import roles, sd3
from fewstep.recipes.adopt import merge_lora
from fewstep.recipes.teacher import latent_shape
from fewstep.report.sheet import sheet
from fewstep.stages import evaluate, pictures
from fewstep.worlds.shapes import TEACHER
from fewstep.worlds.shapes.data import to_uint8

COLUMNS = ("teacher", "teacher with the LoRA", "student", "student with the LoRA")
PICTURE, RECORD = "lora_check.png", "lora_check.json"


@dataclass(frozen=True, eq=False)
class Drawn:
    """One column: latents (P, S, 16, H, W), and the first seed's images (P, H, W, 3)."""

    x0: Tensor
    images: NDArray[np.uint8]


def run(
    student: Path,
    lora: Path,
    out: Path,
    *,
    teacher: Path | None = None,
    scale: float = 1.0,
    prompt_file: Path | None = None,
    count: int = 12,
    seeds: int = 2,
    resolution: int = 0,
) -> dict[str, object]:
    """Draw with teacher and student, each without and with the LoRA; write a picture and the figures.

    Args:
        student: a student's artefact.
        lora: the LoRA, a safetensors file as `fewstep adopt --lora` takes it.
        out: folder of the picture and the figures.
        teacher: the student's teacher; the bundled one by default, if it is.
        scale: how strongly the LoRA is merged.
        prompt_file: prompts to draw; report prompts of the bundled world by default.
        count: prompts.
        seeds: images of each.
        resolution: pixels of an image's side; 0 is the student's.

    Returns:
        The figures: "kept" and "cosine", each {mean, lo, hi}, and what they were made with.

    Raises:
        ValueError: not a student, not its teacher, not a LoRA of it, one without effect, or settings out of range.
        OSError: `out` cannot be written.
    """
    if count < 2 or seeds < 2:
        raise ValueError(f"count = {count}, seeds = {seeds}: give at least 2 of each, for intervals and distances")
    if not lora.is_file():
        raise ValueError(f"{lora} does not exist: give a LoRA of the teacher, a safetensors file")
    made = artifact.read(student)
    if not made.kind.startswith("student"):
        raise ValueError(f"{student} holds a {made.kind}: give a student, such as runs/demo/05-merge")
    source = teacher or TEACHER
    origin = artifact.read(source, "teacher")
    if made.parents.get("teacher") != origin.weights:
        raise ValueError(f"{source} is not the teacher of {student}: give its folder with --teacher")
    own = None if prompt_file is None else [p.text for p in prompt_files.read(prompt_file)]
    texts = prompts.reported(None, count) if own is None else own[:count]
    drawn = [
        _draw(folder, record, texts, seeds, lora if with_it else None, scale, resolution or made.resolution)
        for folder, record in ((source, origin), (student, made))
        for with_it in (False, True)
    ]
    figures: dict[str, object] = {
        **survival(*(column.x0 for column in drawn)),
        "lora": lora.name,
        "scale": scale,
        "student": made.weights,
        "n_prompts": len(texts),
        "n_seeds": seeds,
    }
    out.mkdir(parents=True, exist_ok=True)
    columns = {name: column.images for name, column in zip(COLUMNS, drawn, strict=True)}
    sheet(texts, columns).save(out / PICTURE)
    (out / RECORD).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def survival(teacher: Tensor, moved_teacher: Tensor, student: Tensor, moved_student: Tensor) -> dict[str, dict[str, float]]:
    """What is left of an effect, from four sets of latents (P, S, 16, H, W) of the same noise.

    Returns:
        "kept": <e_s, e_t> / <e_t, e_t>, the student's movement e_s measured along the teacher's e_t: 1 is all of it, 0 none;
        "cosine": of the angle between them. Each prompt counts as one, with an interval over prompts.

    Raises:
        ValueError: the teacher is not moved.
    """
    e_t, e_s = (moved_teacher - teacher).flatten(1).double(), (moved_student - student).flatten(1).double()
    along, own = (e_s * e_t).sum(1), e_t.square().sum(1)
    if not bool((own > 0).all()):
        raise ValueError("the LoRA moves no image of the teacher: it is empty, or its scale is 0")
    cosine = along / (own.sqrt() * e_s.norm(dim=1)).clamp(min=1e-12)
    return {
        "kept": pictures.estimate((along / own)[:, None])._asdict(),
        "cosine": pictures.estimate(cosine[:, None])._asdict(),
    }


def _draw(
    folder: Path, record: Artifact, texts: list[str], seeds: int, lora: Path | None, scale: float, resolution: int
) -> Drawn:
    pipe = sd3.load(folder, without=sd3.unread(record.encoders))
    if lora is not None:
        merge_lora(pipe, lora, scale)
    pipe.transformer.to(roles.FULL.place)
    pipe.vae.to(roles.FULL.place)
    cond = evaluate.encode(pipe, [*texts, ""], record.t5_tokens, 16)
    velocity = sd3.velocity(pipe.transformer, fast_dtype(pipe.transformer.device))
    arm = evaluate.Arm(record.kind, record.grid, record.guidance_scale, velocity, record.weights)
    asked = evaluate.Config("pictures", seeds=seeds, batch=8)
    x0 = pictures.draw(arm, asked, cond, latent_shape(pipe, resolution)).x0
    with torch.no_grad():
        return Drawn(x0, to_uint8(sd3.decode(pipe, x0[:, 0])))
