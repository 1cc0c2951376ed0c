"""How long a distillation takes on this machine, and how to fit it into given minutes.

Budgets end up as image counts, so that a run is decided by its resolved settings and not by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import StableDiffusion3Pipeline

from fewstep.engine.precision import fast_dtype
from fewstep.models import roles, sd3
from fewstep.recipes import distil
from fewstep.recipes.pipeline import Distillation
from fewstep.stages import trajectory

SHARES = {"trajectories": 0.13, "trajectory": 0.20, "distribution": 0.38, "split": 0.07, "merge": 0.04, "evaluate": 0.18}
WATCHED = 0.06  # at most this share looks at the student's health
FIXED_S = 20.0  # opening models, writing artefacts, the report
CAUTION = 0.85  # machines slow down; a demo should not overrun
EVALUATED_PER_PROMPT_TASKS = 6.5  # eight tasks, of which some have fewer prompts than asked


@dataclass(frozen=True)
class Speed:
    """Images a second of one machine and model.

    Attributes:
        forward: network evaluations.
        train: forward, backward and update.
        decode: autoencoder and detector together.
    """

    forward: float
    train: float
    decode: float


def measure(pipe: StableDiffusion3Pipeline, t5_tokens: int, seconds: float = 2.0) -> Speed:
    """Time the three things that cost, about `seconds` each, where the pipeline's networks are."""
    batch, size = 64, pipe.transformer.config.sample_size
    x, t = torch.randn(batch, pipe.transformer.config.in_channels, size, size), torch.rand(batch)
    cond = sd3.encode(pipe, ["a circle"] * batch, t5_tokens)
    student = roles.trainable(pipe.transformer, roles.Config(device=str(pipe.transformer.device)), 0)

    def forward() -> None:
        with torch.no_grad():
            sd3.velocity(pipe.transformer, fast_dtype(pipe.transformer.device))(x, t, cond)

    def train() -> None:
        sd3.velocity(student, fast_dtype(student.device))(x, t, cond).square().mean().backward()
        student.zero_grad()

    def rate(call: Callable[[], object]) -> float:
        call()
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            call()
            calls += 1
        return calls * batch / (time.perf_counter() - start)

    return Speed(rate(forward), rate(train), 0.7 * rate(lambda: sd3.decode(pipe, x)))


def seconds(pipeline: Distillation, speed: Speed) -> dict[str, float]:
    """Estimated seconds of each part of a distillation."""
    steps, t, d, e = len(pipeline.grid) - 1, pipeline.trajectory, pipeline.distribution, pipeline.evaluate
    images = e.per_task * e.seeds * EVALUATED_PER_PROMPT_TASKS
    forwards, trained = steps + 4.0, d.proxy_updates + 2.0  # rollout, guided teacher, proxy; proxy, student twice
    if d.adversary.weight > 0:
        forwards, trained = forwards + 2.0, trained + 1.0  # heads read real and fake; the student's loss goes through
    refine = forwards / speed.forward + trained / speed.train
    merged = pipeline.merge.per_task * pipeline.merge.seeds * EVALUATED_PER_PROMPT_TASKS
    tried = 0 if distil.idle(pipeline) else len(pipeline.merge.ratios) + 3
    students = 2 if distil.idle(pipeline) else 3
    evaluations = 2 * pipeline.teacher_steps + 2 * steps + steps + 2 * max(1, steps // 2) + students * steps
    return {
        "trajectories": t.trajectories * trajectory.evaluations(t, steps) / speed.forward,
        "trajectory": t.images / speed.train,
        "distribution": d.images * refine,
        "split": pipeline.split.images * refine if tried else 0.0,
        "health": _watching(pipeline, 2 if tried else 1) / speed.forward,
        "merge": tried * merged * (steps / speed.forward + 1 / speed.decode),
        "evaluate": images * (evaluations / speed.forward + 8 / speed.decode),
    }


def _watching(pipeline: Distillation, refinements: int) -> float:
    """Network evaluations of looking at the student's health: the teacher's trajectories once, then each look."""
    steps, h = len(pipeline.grid) - 1, pipeline.distribution.health
    if h.looks == 0:
        return 0.0
    # rollout and trajectory error, guided teacher at inner points, proxy and teacher at four times; the strip is little
    look = 2.0 * steps + 2.0 * (steps - 1) + 8.0
    made = trajectory.evaluations(pipeline.trajectory, steps)
    return h.prompts * h.seeds * (made + refinements * (h.looks + 1) * look)


def fit(pipeline: Distillation, speed: Speed, minutes: float) -> Distillation:
    """The same recipe with image counts that fill `minutes`; every stage keeps at least a few updates.

    Raises:
        ValueError: when `minutes` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"--minutes {minutes:g}: give a positive number of minutes; 1 makes a quick, weak student")
    left = max(10.0, CAUTION * 60 * minutes - FIXED_S)
    now = seconds(pipeline, speed)
    watching = now.pop("health")
    health = pipeline.distribution.health
    while health.looks > 0 and watching > WATCHED * left:  # fewer looks, not smaller ones: bands hold for their size
        health = replace(health, looks=health.looks // 2)
        fewer = replace(pipeline, distribution=replace(pipeline.distribution, health=health))
        watching = seconds(fewer, speed)["health"]
    left -= watching
    shared = sum(SHARES[part] for part, took in now.items() if took > 0)  # parts that do nothing leave theirs to others
    scale = {part: SHARES[part] / shared * left / took if took > 0 else 1.0 for part, took in now.items()}
    t, d, e, m = pipeline.trajectory, pipeline.distribution, pipeline.evaluate, pipeline.merge

    def whole(count: float, batch: int, least: int) -> int:
        return max(least, int(count / batch)) * batch

    seeds = e.seeds if scale["evaluate"] * e.per_task >= 8 else 2
    return replace(
        pipeline,
        trajectory=replace(
            t,
            trajectories=whole(scale["trajectories"] * t.trajectories, 64, 1),
            images=whole(scale["trajectory"] * t.images, t.batch, 8),
        ),
        distribution=replace(d, images=whole(scale["distribution"] * d.images, d.batch, 4), health=health),
        split=replace(pipeline.split, images=whole(scale["split"] * pipeline.split.images, d.batch, 2)),
        merge=replace(m, per_task=max(2, int(scale["merge"] * m.per_task))),
        evaluate=replace(e, seeds=seeds, per_task=max(2, int(scale["evaluate"] * e.per_task * e.seeds / seeds))),
    )
