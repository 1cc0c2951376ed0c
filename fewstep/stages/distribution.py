"""Stage `distribution`: distribution matching with timestep sharing (SD3.5-Flash, stage 2).

One update: roll the student out on its grid without gradient; teach the proxy by flow matching on the samples;
then move the student at one grid step by the distribution-matching loss and a share of trajectory guidance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep import grids, noise
from fewstep.conditioning import TextCond
from fewstep.data import trajectories
from fewstep.engine.ema import EMA
from fewstep.engine.loop import train
from fewstep.engine.optim import Optim, Optimizer
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.models import roles, sd3
from fewstep.objectives import distribution, flow_matching
from fewstep.solvers import rollout
from fewstep.stages.trajectory import update as trajectory_update

INITIAL, PICK, RENOISE, TAU = 0, 1, 2, 3  # streams of addressed noise
PROXY = 100  # two streams for each proxy update, from here on


@dataclass(frozen=True)
class Config:
    """How the student is refined.

    Attributes:
        images: student samples used in student updates.
        batch: samples in an update; all share one grid step, which goes round from update to update.
        proxy_updates: proxy updates per student update, on the same samples with fresh times and noise (ours).
        trajectory_weight: share of trajectory guidance kept; without it the intermediate states drift.
        t_mean, t_std: logit-normal density of t for the proxy.
        ema_half_life_images: of the student's average, which is what the stage hands on.
        seed: of noise, prompts and order.
        switches: what is matched, and where it is read.
        optim: the student's optimiser.
        proxy_optim: the proxy's.
    """

    images: int = 8_000
    batch: int = 32
    proxy_updates: int = 5
    trajectory_weight: float = 0.3
    t_mean: float = 0.4
    t_std: float = 1.0
    ema_half_life_images: float = 1_000.0
    seed: int = 2
    switches: distribution.Switches = field(default_factory=distribution.Switches)
    optim: Optim = field(default_factory=lambda: Optim(lr=5e-5, betas=(0.0, 0.999), warmup_images=320, final_lr_ratio=0.1))
    proxy_optim: Optim = field(default_factory=lambda: Optim(lr=2e-4, betas=(0.0, 0.999), warmup_images=320))


def proxy_update(
    proxy: SD3Transformer2DModel, samples: Tensor, cond: TextCond, config: Config, rows: range, number: int
) -> Tensor:
    """Flow-matching loss of the proxy on student samples (B, 16, H, W), scalar; gradient reaches the proxy alone."""
    stream = PROXY + 2 * number
    t = grids.logit_normal(noise.normal((), seed=config.seed, index=rows, step=stream), config.t_mean, config.t_std)
    eps = noise.normal(samples.shape[1:], seed=config.seed, index=rows, step=stream + 1)
    return flow_matching.loss(sd3.velocity(proxy, fast_dtype()), samples.detach(), eps, t, cond).mean()


def student_update(
    student: SD3Transformer2DModel,
    proxy: SD3Transformer2DModel,
    teacher: Velocity,
    x_i: Tensor,
    i: int,
    grid: tuple[float, ...],
    cond: TextCond,
    config: Config,
    rows: range,
) -> distribution.DMResult:
    """Distribution matching for grid step `i` from states `x_i` (B, 16, H, W); gradient reaches the student alone."""
    t_i, t_next = torch.full((len(x_i),), grid[i]), torch.full((len(x_i),), grid[i + 1])
    v = sd3.velocity(student, fast_dtype())(x_i, t_i, cond)

    def fresh() -> Tensor:
        return noise.normal(x_i.shape[1:], seed=config.seed, index=rows, step=RENOISE)

    u = noise.uniform((), seed=config.seed, index=rows, step=TAU)
    frozen_proxy = sd3.velocity(proxy, fast_dtype())
    return distribution.loss(config.switches, teacher, frozen_proxy, x_i, t_i, t_next, v, cond, fresh, u)


def run(
    config: Config,
    start: SD3Transformer2DModel,
    teacher_network: SD3Transformer2DModel,
    teacher: Velocity,
    stored: trajectories.Trajectories,
    encode: trajectories.Encode,
    prompt_at: trajectories.PromptAt,
    work: Path,
    metrics: Path,
) -> SD3Transformer2DModel:
    """Refine a copy of `start` and return its average.

    Args:
        config: settings.
        start: the student after trajectory guidance.
        teacher_network: the teacher's transformer, from which the proxy starts.
        teacher: the teacher's velocity with guidance in it.
        stored: teacher trajectories for the share of trajectory guidance.
        encode: prompts to conditions.
        prompt_at: prompt of sample k.
        work: folder for checkpoints.
        metrics: the run's metrics.jsonl.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when a loss is not finite.
    """
    student, proxy = roles.trainable_copy(start), roles.trainable_copy(teacher_network)
    optimizer = Optimizer(student.named_parameters(), config.optim)
    proxy_optimizer = Optimizer(proxy.named_parameters(), config.proxy_optim)
    ema, grid = EMA({"student": student}, config.ema_half_life_images), stored.grid
    stored_cond = encode(stored.prompts)

    def step(seen: int) -> dict[str, float]:
        rows = range(seen, seen + config.batch)
        cond = encode([prompt_at(k) for k in rows])
        x = noise.normal(stored.x.shape[2:], seed=config.seed, index=rows, step=INITIAL)
        with torch.no_grad():
            path = rollout(sd3.velocity(student, fast_dtype()), x, grid, cond)
        for number in range(config.proxy_updates):
            proxy_loss = proxy_update(proxy, path.x[-1], cond, config, rows, number)
            proxy_loss.backward()
            proxy_optimizer.step(seen, config.images)
        i = (seen // config.batch) % (len(grid) - 1)
        matched = student_update(student, proxy, teacher, path.x[i], i, grid, cond, config, rows)
        pick = noise.integers(0, len(stored.prompts), seed=config.seed, index=rows, step=PICK)
        anchored = trajectory_update(student, stored, stored_cond, pick, torch.full_like(pick, i))
        (matched.loss.mean() + config.trajectory_weight * anchored.mean()).backward()
        norm = optimizer.step(seen, config.images)
        ema.update(seen, config.batch)
        return {
            "proxy_loss": float(proxy_loss.detach()),
            "trajectory_loss": float(anchored.detach().mean()),
            "direction": float(matched.direction.abs().mean()),
            "normaliser": float(matched.normaliser.mean()),
            "grad_norm": float(norm),
            "sample_mean": float(path.x[-1].mean()),
            "sample_std": float(path.x[-1].std()),
        }

    parts = {"student": student, "proxy": proxy, "optimizer": optimizer, "proxy_optimizer": proxy_optimizer, "ema": ema}
    train(
        step,
        parts,
        stage="distribution",
        total_images=config.images - config.images % config.batch,
        images_per_step=config.batch,
        work=work,
        metrics=metrics,
        log_every=4,
    )
    ema.copy_to({"student": student})
    return student.requires_grad_(False)
