"""Recipes for SD3.5 itself, in two tiers.

*Faithful* trains whole networks, divided among GPUs, with the paper's numbers where they are known: stage 1 about 2,000
updates of 1,120 samples at 1e-6, stage 2 about 800, stage 3 about 400 (an average of .99, merged 3 : 7). *Frugal* trains
adapters on one frozen base, for one GPU of 24 GB. Whatever the paper does not say is ours; PAPER.md lists it. Neither tier
has been run at full size by us.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.engine.optim import Optim
from fewstep.grids import STUDENT_GRIDS
from fewstep.models import roles
from fewstep.recipes.pipeline import Distillation
from fewstep.stages import adversary, distribution, evaluate, merge, split, trajectory

MEDIUM, LARGE = "runs/teachers/sd35_medium", "runs/teachers/sd35_large"
SOURCES = {  # of the teacher of each recipe
    **{f"sd35_medium_{n}step{tier}": "stabilityai/stable-diffusion-3.5-medium" for n in (4, 2) for tier in ("", "_frugal")},
    **{f"sd35_large_4step{tier}": "stabilityai/stable-diffusion-3.5-large" for tier in ("", "_frugal")},
}
PROMPTS = "prompts.txt"
TEACHER_STEPS = 50  # what the paper compares with
AVERAGED = 69.0  # updates after which the average has half forgotten: .99 an update, the paper's of stage 3, in all stages
PICTURES = evaluate.Config(benchmark="pictures", pictures=12, seeds=2, batch=4)
MERGE = merge.Config(ratios=(0.3, 0.5, 0.7), seeds=2)


def sd35_medium_4step() -> Distillation:
    """SD3.5-Medium to 4 steps, whole networks."""
    return _faithful("sd35_medium_4step", MEDIUM, 4)


def sd35_medium_2step() -> Distillation:
    """SD3.5-Medium to 2 steps, whole networks."""
    return _faithful("sd35_medium_2step", MEDIUM, 2)


def sd35_large_4step() -> Distillation:
    """SD3.5-Large to 4 steps, whole networks."""
    return _faithful("sd35_large_4step", LARGE, 4)


def sd35_medium_4step_frugal() -> Distillation:
    """SD3.5-Medium to 4 steps by adapters, at 512 pixels."""
    return _frugal("sd35_medium_4step_frugal", MEDIUM, 4)


def sd35_medium_2step_frugal() -> Distillation:
    """SD3.5-Medium to 2 steps by adapters, at 512 pixels."""
    return _frugal("sd35_medium_2step_frugal", MEDIUM, 2)


def sd35_large_4step_frugal() -> Distillation:
    """SD3.5-Large to 4 steps by adapters on a base in 8 bits, at 512 pixels; fewer samples, to stay in ten hours."""
    made = _frugal("sd35_large_4step_frugal", LARGE, 4)
    return replace(
        made,
        roles=replace(made.roles, eight_bit_base=True, eight_bit_moments=True),
        trajectory=replace(made.trajectory, images=20_000, trajectories=1_200),
        distribution=replace(made.distribution, images=4_000),
        split=replace(made.split, images=1_280),
    )


def _faithful(name: str, teacher: str, steps: int) -> Distillation:
    slow = Optim(lr=1e-6, betas=(0.9, 0.999))
    return Distillation(
        name=name,
        teacher=teacher,
        grid=STUDENT_GRIDS[steps],
        teacher_steps=TEACHER_STEPS,
        prompts=PROMPTS,
        roles=roles.Config(trained="full", checkpointing=True, frozen_dtype="bfloat16", sharded=True),
        trajectory=trajectory.Config(
            images=2_000 * 1_120,
            batch=1_120,
            micro_batch=8,
            trajectories=20_000,
            ema_half_life_images=AVERAGED * 1_120,
            optim=replace(slow, warmup_images=50 * 1_120),
        ),
        distribution=distribution.Config(
            images=800 * 64,
            batch=64,
            micro_batch=4,
            ema_half_life_images=AVERAGED * 64,
            optim=replace(slow, betas=(0.0, 0.999)),
            proxy_optim=replace(slow, betas=(0.0, 0.999)),
        ),
        split=split.Config(images=400 * 64, lr_scale=1.0),
        merge=MERGE,
        evaluate=PICTURES,
    )


def _frugal(name: str, teacher: str, steps: int) -> Distillation:
    lora = Optim(lr=5e-5, betas=(0.9, 0.999), warmup_images=320, final_lr_ratio=0.1)
    return Distillation(
        name=name,
        teacher=teacher,
        grid=STUDENT_GRIDS[steps],
        resolution=512,
        teacher_steps=TEACHER_STEPS,
        prompts=PROMPTS,
        roles=roles.Config(trained="lora", rank=64, checkpointing=True, frozen_dtype="bfloat16"),
        trajectory=trajectory.Config(
            images=24_000, batch=16, micro_batch=4, trajectories=1_500, ema_half_life_images=AVERAGED * 16, optim=lora
        ),
        distribution=distribution.Config(
            images=4_800,
            batch=16,
            micro_batch=4,
            ema_half_life_images=AVERAGED * 16,
            proxy_updates=2,
            trajectory_weight=0.05,
            adversary=adversary.Config(weight=0.05),
            optim=replace(lora, betas=(0.0, 0.999)),
            proxy_optim=replace(lora, betas=(0.0, 0.999)),
        ),
        split=split.Config(images=1_600),
        merge=MERGE,
        evaluate=PICTURES,
    )
