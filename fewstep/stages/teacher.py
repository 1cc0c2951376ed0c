"""Stage `teacher` of the bundled world: encoders learn to read, then the transformer trains on them by flow matching."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from fewstep import grids, noise
from fewstep.conditioning import EncoderOutputs, TextCond, assemble, drop
from fewstep.engine.ema import EMA
from fewstep.engine.loop import train
from fewstep.engine.optim import Optim, Optimizer
from fewstep.engine.precision import autocast
from fewstep.models import sd3
from fewstep.objectives import flow_matching
from fewstep.stages import reading
from fewstep.worlds.shapes.architecture import MAX_TOKENS, Architecture, build
from fewstep.worlds.shapes.data import read_latents, wording
from fewstep.worlds.shapes.grammar import wordings

PICK, EPS, TIME, WORDING, DROP, EMPTY = range(6)  # streams of addressed noise


@dataclass(frozen=True)
class Config:
    """How the bundled teacher is trained.

    Attributes:
        images: training images seen.
        batch: images a step.
        latents: distinct scenes encoded beforehand.
        t_mean, t_std: logit-normal density of t; a positive mean dwells on noise, where composition is decided.
        encoder_drop: each encoder is dropped (zeros) independently with this probability. SD3 has 0.464, which would leave
            a network of this size all three in 15 % of the images.
        t5_alone_until: share of the images up to which the sequence holds T5's tokens alone, CLIP speaks through the
            pooled vectors, and nothing is dropped (ours): a third faster. Then CLIP's tokens join.
        empty_prompt: probability of the empty prompt, which is what guidance subtracts.
        compile: compile the transformer (needs a C++ compiler; about a fifth faster on a CPU).
        seed: of weights and of all noise.
        architecture: sizes.
        reading: how the encoders learn to read beforehand.
        optim: optimiser.
    """

    images: int = 1_100_000
    batch: int = 32
    latents: int = 60_000
    t_mean: float = 1.2
    t_std: float = 0.8
    encoder_drop: float = 0.15
    t5_alone_until: float = 0.65
    empty_prompt: float = 0.1
    compile: bool = False
    seed: int = 0
    architecture: Architecture = field(default_factory=Architecture)
    reading: reading.Config = field(default_factory=reading.Config)
    optim: Optim = field(
        default_factory=lambda: Optim(
            lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_images=12_800, final_lr_ratio=0.01
        )
    )

    def __post_init__(self) -> None:
        if not 0 <= self.t5_alone_until < 1:
            raise ValueError(f"t5_alone_until = {self.t5_alone_until}: give 0 to below 1, CLIP's tokens come after it")


def run(config: Config, pipe: StableDiffusion3Pipeline, latents: Path, work: Path, metrics: Path) -> None:
    """Train `pipe` in place: the encoders on captions, then, with those frozen, the transformer, kept averaged.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when the loss is not finite.
    """
    reading.run(config.reading, pipe, config.seed, work / "reading", metrics)
    latents_of, asks = read_latents(latents)
    table, row_of = encode_all(pipe, sorted({"", *(text for ask in set(asks) for text in wordings(ask))}))
    transformer = pipe.transformer.requires_grad_(True).train()
    optimizer = Optimizer(transformer.named_parameters(), config.optim)
    ema = EMA({"transformer": transformer}, 0.05 * config.images)
    # one graph for each of the two lengths of the sequence
    velocity = sd3.velocity(torch.compile(transformer, dynamic=False) if config.compile else transformer)

    def step(seen: int) -> dict[str, float]:
        rows = range(seen, seen + config.batch)

        def at(stream: int) -> dict[str, Any]:
            return {"seed": config.seed, "index": rows, "step": stream}

        pick = noise.integers(0, len(asks), **at(PICK))
        x0 = latents_of[pick].float()
        draws = noise.integers(0, 1 << 30, **at(WORDING)).tolist()
        empty = noise.uniform((), **at(EMPTY)) < config.empty_prompt
        texts = ["" if e else wording(asks[i], d) for i, d, e in zip(pick.tolist(), draws, empty, strict=True)]
        t5_alone = seen < config.t5_alone_until * config.images
        keep = noise.uniform((3,), **at(DROP)) >= (0.0 if t5_alone else config.encoder_drop)
        t = grids.logit_normal(noise.normal((), **at(TIME)), config.t_mean, config.t_std)
        with autocast():
            cond = assemble(drop(table[torch.tensor([row_of[t] for t in texts])], keep | empty[:, None]))
            if t5_alone:
                cond = TextCond(cond.tokens[:, -table.t5_tokens.shape[1] :], cond.pooled)
            losses = flow_matching.loss(velocity, x0, noise.normal((16, 8, 8), **at(EPS)), t, cond)
        loss = losses.mean()
        loss.backward()
        norm = optimizer.step(seen, config.images)
        ema.update(seen, config.batch)
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    train(
        step,
        {"transformer": transformer, "optimizer": optimizer, "ema": ema},
        stage="teacher",
        total_images=config.images,
        images_per_step=config.batch,
        work=work / "transformer",
        metrics=metrics,
    )
    ema.copy_to({"transformer": transformer})
    transformer.requires_grad_(False).eval()


@torch.no_grad()
def encode_all(pipe: StableDiffusion3Pipeline, texts: list[str]) -> tuple[EncoderOutputs, dict[str, int]]:
    """What the encoders say of every text, and which row of it is whose: frozen encoders are asked once."""
    ids = sd3.tokenize(pipe, texts, MAX_TOKENS)
    parts = [sd3.encode_ids(pipe, chunk) for chunk in zip(*(of_encoder.split(1024) for of_encoder in ids), strict=True)]
    return EncoderOutputs.cat(parts), {text: i for i, text in enumerate(texts)}


def untrained(config: Config, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The pipeline that training starts from, around a trained autoencoder."""
    return build(config.architecture, vae, config.seed)
