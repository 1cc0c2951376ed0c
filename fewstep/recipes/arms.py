"""What a model is measured against, and its headline score."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline

from fewstep import grids
from fewstep.engine.artifact import Artifact
from fewstep.engine.precision import fast_dtype
from fewstep.evaluate.outcomes import Outcome
from fewstep.models import sd3
from fewstep.report import numbers
from fewstep.stages import evaluate


def teacher_arms(pipe: StableDiffusion3Pipeline, record: Artifact, teacher_steps: int, steps: int) -> list[evaluate.Arm]:
    """The ceiling; the teacher in full, at the student's steps with guidance, and at the student's evaluations."""
    network = sd3.velocity(pipe.transformer, fast_dtype(pipe.transformer.device))

    def arm(count: int, scale: float) -> evaluate.Arm:
        name = f"teacher_{count}_{'unguided' if scale == 1 else 'guided'}"
        return evaluate.Arm(name, grids.shifted_grid(count), scale, network, record.weights)

    w = record.guidance_scale
    arms = [evaluate.Arm("autoencoder_ceiling", (), 1.0, None, record.weights)]
    arms += [arm(teacher_steps, w), arm(steps, w), arm(steps, 1.0)]
    arms += [arm(steps // 2, w)] if steps % 2 == 0 else []
    return list({arm.name: arm for arm in arms}.values())  # some coincide where the teacher needs no guidance


def strict_overall(arm: Outcome) -> float:
    """The headline score of an arm, in [0, 1]."""
    found = [r for r in numbers.rows(arm) if r["scoring"] == "strict" and r["task"] == "overall"]
    return float(found[0]["mean"])
