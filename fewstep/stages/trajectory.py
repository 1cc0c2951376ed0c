"""Stage `trajectory`: warm-start the student on the average velocity of the guided teacher (SD3.5-Flash, stage 1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.data import embeddings, trajectories
from fewstep.engine import ranks
from fewstep.engine.ema import EMA
from fewstep.engine.loop import microbatches, train
from fewstep.engine.optim import Optim, Optimizer
from fewstep.engine.precision import fast_dtype
from fewstep.models import roles, sd3
from fewstep.objectives import trajectory
from fewstep.solvers import CALLS, Solver
from fewstep.stages.encoders import Reads, everything

PICK, STEP = 1, 2  # streams of addressed noise


@dataclass(frozen=True)
class Config:
    """How the student is warm-started.

    Attributes:
        images: student steps trained on (a stored trajectory is used several times).
        batch: student steps in an update, each at its own grid step.
        micro_batch: how many of them are in memory at once, their gradients added up; 0 is all.
        trajectories: teacher trajectories made beforehand.
        teacher_substeps: teacher steps inside one student step.
        teacher_solver: how it takes them: "euler", "heun" (second order, two calls a step) or "ab2" (second order, one call).
        ema_half_life_images: of the student's average, which is what the stage hands on.
        seed: of noise, prompts and order.
        optim: optimiser.
    """

    images: int = 64_000
    batch: int = 64
    micro_batch: int = 0
    trajectories: int = 4_000
    teacher_substeps: int = 4
    teacher_solver: Solver = "ab2"
    ema_half_life_images: float = 2_000.0
    seed: int = 1
    optim: Optim = field(default_factory=lambda: Optim(lr=6e-4, betas=(0.9, 0.99), warmup_images=640, final_lr_ratio=0.05))


def evaluations(config: Config, steps: int) -> int:
    """Network evaluations in a teacher trajectory over a grid of `steps` steps; guidance takes two a call."""
    return 2 * steps * config.teacher_substeps * CALLS[config.teacher_solver]


def update(
    student: SD3Transformer2DModel, stored: trajectories.Trajectories, cond: TextCond, rows: Tensor, steps: Tensor
) -> Tensor:
    """Loss of one batch of stored pairs, (B,); gradient reaches the student alone.

    Args:
        student: the network that is trained.
        stored: teacher trajectories.
        cond: conditions of these trajectories, B rows.
        rows: (B,) trajectory numbers.
        steps: (B,) grid steps.
    """
    x_i, target = stored.pair(rows, steps)
    velocity = sd3.velocity(student, fast_dtype(sd3.home(student)))
    return trajectory.loss(velocity, x_i, torch.tensor(stored.grid, device=steps.device)[steps], target, cond)


def run(
    config: Config,
    teacher: SD3Transformer2DModel,
    stored: trajectories.Trajectories,
    encode: trajectories.Encode,
    work: Path,
    metrics: Path,
    trained: roles.Config = roles.FULL,
    reads: Reads = everything,
) -> SD3Transformer2DModel:
    """Train a copy of the teacher, or adapters on it, on stored trajectories; returns the average, frozen.

    Args:
        config: settings.
        teacher: where the student starts.
        stored: teacher trajectories.
        encode: prompts to conditions.
        work: folder for checkpoints.
        metrics: the run's metrics.jsonl.
        trained: what of the network is trained.
        reads: what of a condition the student is given.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when the loss is not finite.
    """
    student = roles.trainable(teacher, trained, config.seed)
    optimizer = Optimizer(student.named_parameters(), config.optim, trained.eight_bit_moments)
    ema = EMA({"student": student}, config.ema_half_life_images)
    conditions, last_step, device = embeddings.conditions(encode, stored.prompts), len(stored.grid) - 1, sd3.home(student)

    def step(seen: int) -> dict[str, float]:
        rows = range(seen, seen + config.batch)
        pick = noise.integers(0, len(stored.prompts), seed=config.seed, index=rows, step=PICK, device=device)
        steps = noise.integers(0, last_step, seed=config.seed, index=rows, step=STEP, device=device)
        made = []
        for part in microbatches(ranks.share(range(config.batch)), config.micro_batch):
            own = slice(part.start, part.stop)
            cond = reads(conditions(pick[own]), rows[own])
            losses = update(student, stored, cond, pick[own], steps[own])
            (losses.sum() / config.batch).backward()
            made.append(losses.detach())
        norm = optimizer.step(seen, config.images)
        ema.update(seen, config.batch)
        share = ranks.share(range(config.batch))
        values, steps = torch.cat(made), steps[share.start : share.stop]
        by_step = {f"loss_step_{i}": float(values[steps == i].mean()) for i in range(last_step) if (steps == i).any()}
        return {"loss": float(values.mean()), "grad_norm": float(norm), **by_step}

    train(
        step,
        {"student": roles.Trained(student), "optimizer": optimizer, "ema": ema},
        stage="trajectory",
        total_images=config.images - config.images % config.batch,
        images_per_step=config.batch,
        work=work,
        metrics=metrics,
    )
    ema.copy_to({"student": student})
    return student.requires_grad_(False)
