"""A teacher of the right classes that is tiny and says something: for tests that need a whole artefact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from fewstep.engine import artifact, health
from fewstep.engine.artifact import Artifact
from fewstep.grids import STUDENT_GRIDS, shifted_grid
from fewstep.models import sd3
from fewstep.recipes.pipeline import Distillation
from fewstep.stages import adversary, autoencoder, distribution, evaluate, merge, split, trajectory
from fewstep.worlds.shapes.architecture import MAX_TOKENS, Architecture, build

Call = Callable[..., tuple[int, str, str]]  # a command in this process: exit code, stdout, stderr
SIZES = Architecture(
    width=64, layers=2, dual_layers=1, clip_l_width=32, clip_g_width=32, t5_width=64, encoder_layers=2
)
GUIDANCE = 2.0
LOOKS = health.Config(looks=1, prompts=2, seeds=2)
HEADS = adversary.Config(heads=2, hidden=8, refresh=0.3)  # two blocks; renewed often enough to be seen


def tiny_pipe(seed: int = 0) -> StableDiffusion3Pipeline:
    """An untrained pipeline whose outputs depend on everything: what starts at zero is random here."""
    torch.manual_seed(seed)
    pipe = build(SIZES, autoencoder.build((8, 8, 8, 8)), seed)
    transformer = pipe.transformer
    zeroed = [transformer.proj_out]
    zeroed += [n.linear for block in transformer.transformer_blocks for n in (block.norm1, block.norm1_context)]
    with torch.no_grad():
        for layer in zeroed:
            layer.weight.normal_(std=0.2)
            layer.bias.normal_(std=0.2)
    for name in sd3.NETWORKS:
        getattr(pipe, name).requires_grad_(False).eval()
    return pipe


def tiny_teacher(folder: Path, seed: int = 0) -> Path:
    """Write the pipeline as an artefact of kind teacher; returns the folder."""
    record = Artifact(
        kind="teacher",
        recipe="tiny",
        grid=shifted_grid(32),
        guidance_scale=GUIDANCE,
        t5_tokens=MAX_TOKENS,
        images_seen=1,
    )
    pipe = tiny_pipe(seed)
    artifact.write(folder, record, lambda at: sd3.save(pipe, at))
    return folder


def tiny_recipe(teacher: Path, steps: int, **changes: Any) -> Distillation:
    """A distillation of a few updates in every stage."""
    return dataclasses.replace(
        Distillation(
            name=f"shapes_{steps}step",
            teacher=str(teacher),
            grid=STUDENT_GRIDS[steps],
            trajectory=trajectory.Config(images=16, batch=4, trajectories=6, teacher_substeps=1),
            distribution=distribution.Config(images=8 * steps, batch=4, proxy_updates=2, adversary=HEADS, health=LOOKS),
            split=split.Config(images=24),
            merge=merge.Config(ratios=(0.0, 0.5), per_task=1, seeds=1),
            evaluate=evaluate.Config(per_task=2, seeds=1, batch=32),
        ),
        **changes,
    )
