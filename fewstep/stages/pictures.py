"""Stage `evaluate` without a detector: the same prompts and noise through every arm, side by side, to be looked at.

Only the bundled world reads its images. What can be measured of any other model is how far an arm lands from the teacher
when both start from the same noise. The unit is the teacher's own variety: 0 is the same image, 1 is as far away as
another seed of the same prompt. All of it is ours.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.engine.log import Progress
from fewstep.evaluate.statistics import Estimate, bootstrap
from fewstep.guidance import guided
from fewstep.solvers import rollout
from fewstep.stages.evaluate import Arm, Config


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one arm drew.

    Attributes:
        x0: (P, S, 16, H, W) latents of P prompts with S seeds each.
        seconds_per_image: of sampling, in batches.
    """

    x0: Tensor
    seconds_per_image: float


def asked(config: Config, arm: Arm, texts: Sequence[str], shape: Sequence[int]) -> str:
    """Hash of what is asked of an arm, and how it is sampled."""
    told = json.dumps([list(texts), config.seeds, config.noise_seed, list(shape), arm.grid, arm.guidance_scale])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def run(
    config: Config, arms: Sequence[Arm], texts: Sequence[str], cond: TextCond, shape: Sequence[int], out: Path
) -> dict[str, Drawn]:
    """Draw with every arm; one that `out` already holds, of these questions and weights, is read instead.

    Args:
        config: number of seeds, batch, seed of the noise.
        arms: distinct names, all with a velocity.
        texts: P prompts.
        cond: their conditions, and last the negative one.
        shape: (16, H, W) of a latent.
        out: folder of the latents, a safetensors file for each arm.

    Raises:
        ValueError: fewer than two seeds, which leave distances without a unit.
    """
    if config.seeds < 2:
        raise ValueError(f"evaluate.seeds = {config.seeds}: distances are told in the distance of two seeds; give at least 2")
    out.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for arm in arms:
        question, path = asked(config, arm, texts, shape), out / f"{arm.name}.safetensors"
        made = _read(path, question, arm.fingerprint)
        if made is None:
            made = draw(arm, config, cond, shape)
            partial = path.with_suffix(".partial")
            told = {"asked": question, "fingerprint": arm.fingerprint, "seconds": str(made.seconds_per_image)}
            save_file({"x0": made.x0.contiguous()}, partial, told)
            partial.replace(path)
        drawn[arm.name] = made
    return drawn


def whole(config: Config, arm: Arm, texts: Sequence[str], shape: Sequence[int], out: Path) -> bool:
    """Whether `out` already holds an arm, so that `run` only reads."""
    return _read(out / f"{arm.name}.safetensors", asked(config, arm, texts, shape), arm.fingerprint) is not None


@torch.no_grad()
def draw(arm: Arm, config: Config, cond: TextCond, shape: Sequence[int]) -> Drawn:
    """All images of one arm; noise of image k = prompt x seeds + seed by address, so every arm starts alike."""
    assert arm.velocity is not None
    prompts = len(cond) - 1
    velocity = guided(arm.velocity, cond[prompts], arm.guidance_scale)
    numbers, made = range(prompts * config.seeds), []
    progress, start = Progress(f"draw {arm.name}", len(numbers)), time.perf_counter()
    for first in range(0, len(numbers), config.batch):
        rows = numbers[first : first + config.batch]
        eps = noise.normal(shape, seed=config.noise_seed, index=rows, step=0)
        own = cond[torch.tensor([k // config.seeds for k in rows])]
        made.append(rollout(velocity, eps, arm.grid, own).x[-1])
        progress.show(rows.stop)
    progress.close()
    seconds = (time.perf_counter() - start) / len(numbers)
    return Drawn(torch.cat(made).unflatten(0, (prompts, config.seeds)), seconds)


def distance(own: Tensor, teacher: Tensor) -> Tensor:
    """How far samples are from the teacher's of the same noise, (P, S); 1 is as far as another seed of the teacher.

    Args:
        own: (P, S, 16, H, W) samples.
        teacher: the teacher's from the same noise.
    """
    apart = (own - teacher).flatten(2).norm(dim=2)
    return apart / between_seeds(teacher)[:, None]


def variety(own: Tensor, teacher: Tensor) -> Tensor:
    """Distance between seeds of a prompt over the teacher's, (P, 1): below 1 variety is lost."""
    return (between_seeds(own) / between_seeds(teacher))[:, None]


def between_seeds(x0: Tensor) -> Tensor:
    """Mean distance of two seeds of each prompt, (P,), from (P, S, 16, H, W)."""
    flat, seeds = x0.flatten(2), x0.shape[1]
    return torch.cdist(flat, flat).sum((1, 2)) / (seeds * (seeds - 1))


def estimate(values: Tensor) -> Estimate:
    """Mean of (P, S) values with its interval; prompts are the clusters."""
    return bootstrap(values.double().numpy(), ["all"] * len(values))["all"]


def _read(path: Path, question: str, fingerprint: str) -> Drawn | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            if (told.get("asked"), told.get("fingerprint")) != (question, fingerprint):
                return None
            return Drawn(file.get_tensor("x0"), float(told["seconds"]))
    except SafetensorError:  # damaged: drawn again
        return None
