"""Make the bundled teacher: autoencoder, teacher, the choice of its guidance scale, and its scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusion3Pipeline

from fewstep import grids
from fewstep.engine import artifact, files
from fewstep.engine.artifact import Artifact
from fewstep.engine.config import to_dict
from fewstep.engine.precision import fast_dtype
from fewstep.models import sd3
from fewstep.recipes.arms import strict_overall, teacher_arms
from fewstep.recipes.layout import FOLDER, METRICS, timed
from fewstep.recipes.pipeline import TeacherTraining
from fewstep.report import numbers, page
from fewstep.stages import autoencoder, evaluate, teacher
from fewstep.worlds.shapes import TEACHER
from fewstep.worlds.shapes.architecture import MAX_TOKENS
from fewstep.worlds.shapes.data import write_latents


def run(pipeline: TeacherTraining, out: Path, wanted: Sequence[str]) -> Path | None:
    """Train what is wanted of autoencoder and teacher, and measure the teacher; returns `report.json` if it did."""
    work, metrics = out / "work", out / METRICS
    vae_folder, folder = out / FOLDER["autoencoder"], out / FOLDER["teacher"]
    if "autoencoder" in wanted and not (vae_folder / "config.json").is_file():
        if pipeline.reuse_autoencoder:
            vae = autoencoder.load(TEACHER / "vae")
        else:
            with timed(out, "autoencoder"):
                vae = autoencoder.run(pipeline.autoencoder, work / "autoencoder", metrics)
        partial = vae_folder.with_name(vae_folder.name + ".partial")
        vae.save_pretrained(partial)
        partial.replace(vae_folder)
    if "teacher" in wanted and not artifact.exists(folder):
        vae = autoencoder.load(vae_folder)
        latents = out / "latents"
        with timed(out, "teacher"):
            write_latents(vae, pipeline.teacher.latents, pipeline.teacher.seed + 100, latents)
            pipe = teacher.untrained(pipeline.teacher, vae)
            teacher.run(pipeline.teacher, pipe, latents, work / "teacher", metrics)
            choose_and_write(pipeline, pipe, folder, out / "selection")
    if "evaluate" not in wanted:
        return None
    record, pipe = artifact.read(folder, "teacher"), sd3.load(folder)
    arms = teacher_arms(pipe, record, pipeline.teacher_steps, 4)
    collected = evaluate.run(pipeline.evaluate, arms, pipe, record.t5_tokens, out / page.EVALUATION)
    rows = [row for arm in collected["arms"].values() for row in numbers.rows(arm)]
    files.write(out / "report.json", json.dumps({"protocol": collected["protocol"], "rows": rows}, indent=1))
    return out / "report.json"


def choose_and_write(pipeline: TeacherTraining, pipe: StableDiffusion3Pipeline, folder: Path, scratch: Path) -> Artifact:
    """Choose the guidance scale on selection prompts by the strict overall score, and write the teacher's artefact."""
    network, grid = sd3.velocity(pipe.transformer, fast_dtype()), grids.shifted_grid(pipeline.teacher_steps)
    arms = [evaluate.Arm(f"w_{w:g}", grid, w, network, "selection") for w in pipeline.guidance_scales]
    collected = evaluate.run(pipeline.evaluate, arms, pipe, MAX_TOKENS, scratch, split="select")
    scores = {w: strict_overall(collected["arms"][f"w_{w:g}"]) for w in pipeline.guidance_scales}
    best = max(scores, key=lambda w: scores[w])
    made = Artifact(
        kind="teacher",
        recipe=pipeline.name,
        grid=grid,
        guidance_scale=best,
        t5_tokens=MAX_TOKENS,
        images_seen=pipeline.teacher.images,
        metrics={f"select_strict_w_{w:g}": score for w, score in scores.items()},
        config=to_dict(pipeline.teacher),
    )
    return artifact.write(folder, made, lambda at: sd3.save(pipe, at))
