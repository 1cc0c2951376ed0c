"""Stage `evaluate`: the same prompts and the same initial noise through every arm, read by the detector, judged."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.engine.log import Progress
from fewstep.evaluate import outcomes
from fewstep.evaluate.benchmark import noise_index
from fewstep.evaluate.protocol import Protocol, shapes_protocol
from fewstep.flow import Velocity
from fewstep.guidance import guided
from fewstep.models import sd3
from fewstep.solvers import renoising_rollout, rollout
from fewstep.worlds.shapes.data import to_pixels, to_uint8
from fewstep.worlds.shapes.detect import Detection, Found, detect
from fewstep.worlds.shapes.prompts import Prompt, Split, is_held_out, place_ask, training_scene
from fewstep.worlds.shapes.render import render
from fewstep.worlds.shapes.scene import Scene
from fewstep.worlds.shapes.score import describe, facts, score

LATENT = (16, 8, 8)
FEW_IMAGES = 256  # below this, starting processes costs more than it saves


@dataclass(frozen=True)
class Config:
    """How much is asked.

    Attributes:
        benchmark: "shapes": the tasks of the bundled world, read by its detector. "pictures": for any other model; arms are
            drawn side by side on held-out prompts, and measured by their distance from the teacher (`stages.pictures`).
        pictures: prompts of "pictures".
        per_task: prompts of each task of "shapes" (a small task gives all it has).
        seeds: images of each prompt.
        batch: images sampled at once.
        noise_seed: of all initial noise.
    """

    benchmark: Literal["shapes", "pictures"] = "shapes"
    pictures: int = 12
    per_task: int = 60
    seeds: int = 4
    batch: int = 64
    noise_seed: int = 7777


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to make images.

    Attributes:
        name: also the name of its files.
        grid: times visited, from 1 to 0; empty for the autoencoder.
        guidance_scale: 1 is off; else every step costs two evaluations.
        velocity: without guidance; None sends true scenes through the autoencoder, the ceiling of every arm.
        fingerprint: names the weights (a hash of the artefact); another one means another outcome.
        renoise: sample with fresh noise in every step, as DMD2's students are trained and sampled, instead of Euler's.
    """

    name: str
    grid: tuple[float, ...]
    guidance_scale: float
    velocity: Velocity | None
    fingerprint: str
    renoise: bool = False

    @property
    def nfe(self) -> int:
        """Network evaluations an image."""
        if self.velocity is None:
            return 0
        return (len(self.grid) - 1) * guided(self.velocity, None, self.guidance_scale).nfe_per_call


def run(
    config: Config,
    arms: Sequence[Arm],
    pipe: StableDiffusion3Pipeline,
    t5_tokens: int,
    out: Path,
    split: Split = "report",
) -> dict[str, Any]:
    """Evaluate arms; one that `out` already holds, of this protocol and fingerprint, is read instead.

    Args:
        config: how much is asked.
        arms: distinct names.
        pipe: its encoders and autoencoder serve every arm.
        t5_tokens: length of the T5 part of a condition.
        out: folder of the outcomes (see `evaluate.outcomes`).
        split: "report", or "select" when something is chosen by the result.

    Returns:
        {"protocol": its summary with the hash, "arms": {name: outcome}}.

    Raises:
        ValueError: two arms share a name, or the configuration is out of range.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms share a name: {', '.join(sorted(names))}")
    if config.batch < 1:
        raise ValueError(f"evaluate.batch must be at least 1, not {config.batch}")
    protocol = shapes_protocol(split, config.per_task, config.seeds, noise_seed=config.noise_seed)
    collected: dict[str, outcomes.Outcome] = {}
    conds: TextCond | None = None
    for arm in arms:
        outcome = outcomes.read(out, arm.name, protocol.hash, arm.fingerprint)
        if outcome is None:
            if conds is None:
                conds = encode(pipe, [*(p.text for p in protocol.prompts), ""], t5_tokens, config.batch)
            outcome, images = evaluate(arm, protocol, pipe, conds, config.batch)
            outcomes.write(out, outcome, images)
        collected[arm.name] = outcome
    return {"protocol": protocol.summary(), "arms": collected}


def whole(config: Config, arms: Sequence[Arm], out: Path, split: Split = "report") -> bool:
    """Whether `out` already holds every arm, so that `run` only reads."""
    protocol = shapes_protocol(split, config.per_task, config.seeds, noise_seed=config.noise_seed)
    return all(outcomes.read(out, arm.name, protocol.hash, arm.fingerprint) for arm in arms)


def encode(pipe: StableDiffusion3Pipeline, texts: Sequence[str], t5_tokens: int, batch: int) -> TextCond:
    """Conditions of texts, each distinct one encoded once, in the order given."""
    distinct = list(dict.fromkeys(texts))
    chunks = [distinct[i : i + batch] for i in range(0, len(distinct), batch)]
    conds = TextCond.cat([sd3.encode(pipe, chunk, t5_tokens) for chunk in chunks])
    position = {text: i for i, text in enumerate(distinct)}
    return conds[torch.tensor([position[t] for t in texts])]


def evaluate(
    arm: Arm, protocol: Protocol, pipe: StableDiffusion3Pipeline, conds: TextCond, batch: int
) -> tuple[outcomes.Outcome, NDArray[np.uint8]]:
    """Make, read and judge all images of one arm.

    Args:
        arm: what makes the images.
        protocol: what is asked.
        pipe: for its autoencoder.
        conds: one condition for each prompt, and last the negative one.
        batch: images at once.

    Returns:
        The outcome, and the images (N, 64, 64, 3).
    """
    scenes = [] if arm.velocity else [true_scene(protocol, p, s) for p, s in protocol.images]
    made: list[NDArray[np.uint8]] = []
    progress = Progress(f"evaluate {arm.name}", len(protocol.images))
    start = time.perf_counter()
    for first in range(0, len(protocol.images), batch):
        numbers = protocol.images[first : first + batch]
        if arm.velocity:
            made.append(sample(arm, protocol, pipe, conds, numbers))
        else:
            made.append(restore(pipe, scenes[first : first + batch]))
        progress.show(min(first + batch, len(protocol.images)))
    seconds = time.perf_counter() - start
    images = np.concatenate(made)
    prompts = [protocol.prompts[p] for p, _ in protocol.images]
    results = judge(images, prompts)
    for i, (result, (p, s)) in enumerate(zip(results, protocol.images, strict=True)):
        result["prompt"], result["seed"] = p, s
        if scenes:
            result["truth"] = [list(f) for f in facts(seen(scenes[i]))]
    strict = float(np.mean([r["strict"] for r in results]))
    progress.close(f"{strict:.1%} of images strictly right")
    outcome: outcomes.Outcome = {
        "format": outcomes.FORMAT,
        "name": arm.name,
        "fingerprint": arm.fingerprint,
        "protocol": protocol.hash,
        "grid": list(arm.grid),
        "guidance_scale": arm.guidance_scale,
        "nfe": arm.nfe,
        "seconds_per_image": seconds / len(images),
        "results": results,
    }
    return outcome, images


@torch.no_grad()
def sample(
    arm: Arm,
    protocol: Protocol,
    pipe: StableDiffusion3Pipeline,
    conds: TextCond,
    numbers: Sequence[tuple[int, int]],
) -> NDArray[np.uint8]:
    """Images (B, 64, 64, 3) of (prompt, seed) pairs; initial noise by address, so every arm starts alike."""
    assert arm.velocity is not None
    index = [noise_index(p, s) for p, s in numbers]
    eps = noise.normal(LATENT, seed=protocol.noise_seed, index=index, step=0).to(conds.pooled.device)
    cond = conds[torch.tensor([p for p, _ in numbers])]
    velocity = guided(arm.velocity, conds[len(conds) - 1], arm.guidance_scale)
    if not arm.renoise:
        return to_uint8(sd3.decode(pipe, rollout(velocity, eps, arm.grid, cond).x[-1]))

    def fresh(i: int) -> torch.Tensor:
        return noise.normal(LATENT, seed=protocol.noise_seed, index=index, step=1 + i).to(eps)

    return to_uint8(sd3.decode(pipe, renoising_rollout(velocity, eps, arm.grid, cond, fresh).x[-1]))


@torch.no_grad()
def restore(pipe: StableDiffusion3Pipeline, scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """True scenes through the autoencoder and back, (B, 64, 64, 3)."""
    pixels = to_pixels(np.stack([render(scene) for scene in scenes])).to(pipe.vae.device)
    return to_uint8(sd3.decode(pipe, sd3.encode_pixels(pipe, pixels)))


def true_scene(protocol: Protocol, prompt: int, seed: int) -> Scene:
    """A scene in which the prompt is true, from the distribution that the teacher was trained on."""
    ask = protocol.prompts[prompt].ask
    rng = np.random.default_rng([protocol.noise_seed, noise_index(prompt, seed)])
    return place_ask(ask, rng) if is_held_out(ask) else training_scene(ask, rng)


def seen(scene: Scene) -> Detection:
    """What a perfect detector reads from a scene."""
    return Detection(
        tuple(Found(o.shape, o.color, o.size, o.x, o.y, o.radius, 1.0) for o in scene.objects), 0
    )


def judge(images: NDArray[np.uint8], prompts: Sequence[Prompt], workers: int = 2) -> list[outcomes.Result]:
    """Read and judge images (N, 64, 64, 3), each against its prompt; prompt and seed numbers are left at 0."""
    if len(images) < FEW_IMAGES:
        return _judged(map(detect, images), prompts)
    with ProcessPoolExecutor(workers) as pool:
        return _judged(pool.map(detect, images, chunksize=64), prompts)


def _judged(detections: Iterable[Detection], prompts: Sequence[Prompt]) -> list[outcomes.Result]:
    results: list[outcomes.Result] = []
    for detection, prompt in zip(detections, prompts, strict=True):
        verdict = score(detection, prompt.ask)
        results.append(
            {
                "prompt": 0,
                "seed": 0,
                "text": prompt.text,
                "task": prompt.task,
                "strict": verdict.strict,
                "geneval": verdict.geneval,
                "unknown": verdict.unknown,
                "reason": verdict.reason,
                "description": describe(detection),
                "facts": [list(f) for f in facts(detection)],
            }
        )
    return results
