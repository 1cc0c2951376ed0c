"""Stage `teacher` of the bundled world: train transformer and text encoders jointly by flow matching, as SD3 was."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor

from fewstep import grids, noise
from fewstep.conditioning import assemble, drop
from fewstep.engine.ema import EMA
from fewstep.engine.loop import train
from fewstep.engine.optim import Optim, Optimizer
from fewstep.engine.precision import autocast
from fewstep.models import sd3
from fewstep.objectives import flow_matching
from fewstep.worlds.shapes.architecture import MAX_TOKENS, Architecture, build
from fewstep.worlds.shapes.data import read_latents, wording

TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
PICK, EPS, TIME, WORDING, DROP, EMPTY = range(6)  # streams of addressed noise


@dataclass(frozen=True)
class Config:
    """How the bundled teacher is trained.

    Attributes:
        images: training images seen.
        batch: images a step.
        latents: distinct scenes encoded beforehand.
        t_mean, t_std: logit-normal density of t; a positive mean dwells on noise, where composition is decided.
        encoder_drop: each encoder is dropped (zeros) independently with this probability, as in SD3.
        encoder_drop_from: share of the images after which dropping begins; before it, words are learned faster (ours).
        empty_prompt: probability of the empty prompt, which is what guidance subtracts.
        compile: compile the transformer (needs a C++ compiler; about a fifth faster on a CPU).
        seed: of weights and of all noise.
        architecture: sizes.
        optim: optimiser.
    """

    images: int = 480_000
    batch: int = 32
    latents: int = 80_000
    t_mean: float = 0.8
    t_std: float = 1.0
    encoder_drop: float = 0.464
    encoder_drop_from: float = 0.6
    empty_prompt: float = 0.1
    compile: bool = False
    seed: int = 0
    architecture: Architecture = field(default_factory=Architecture)
    optim: Optim = field(
        default_factory=lambda: Optim(
            lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_images=12_800, final_lr_ratio=0.01
        )
    )


def run(config: Config, pipe: StableDiffusion3Pipeline, latents: Path, work: Path, metrics: Path) -> None:
    """Train `pipe`'s transformer and encoders in place; on return they hold the averaged weights.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when the loss is not finite.
    """
    latents_of, asks = read_latents(latents)
    networks = {name: getattr(pipe, name).requires_grad_(True).train() for name in TRAINED}
    named = [(f"{n}.{p}", w) for n, network in networks.items() for p, w in network.named_parameters()]
    optimizer, ema = Optimizer(named, config.optim), EMA(networks, 0.05 * config.images)
    velocity = sd3.velocity(torch.compile(pipe.transformer) if config.compile else pipe.transformer)
    tokens: dict[str, tuple[Tensor, ...]] = {}

    def ids_of(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        new = sorted(set(texts) - tokens.keys())
        if new:
            tokens.update(zip(new, zip(*sd3.tokenize(pipe, new, MAX_TOKENS), strict=True), strict=True))
        a, b, c = (torch.stack(rows) for rows in zip(*(tokens[t] for t in texts), strict=True))
        return a, b, c

    def step(seen: int) -> dict[str, float]:
        rows = range(seen, seen + config.batch)

        def at(stream: int) -> dict[str, Any]:
            return {"seed": config.seed, "index": rows, "step": stream}

        pick = noise.integers(0, len(asks), **at(PICK))
        x0 = latents_of[pick].float()
        draws = noise.integers(0, 1 << 30, **at(WORDING)).tolist()
        empty = noise.uniform((), **at(EMPTY)) < config.empty_prompt
        texts = ["" if e else wording(asks[i], d) for i, d, e in zip(pick.tolist(), draws, empty, strict=True)]
        dropping = config.encoder_drop if seen >= config.encoder_drop_from * config.images else 0.0
        keep = noise.uniform((3,), **at(DROP)) >= dropping
        t = grids.logit_normal(noise.normal((), **at(TIME)), config.t_mean, config.t_std)
        with autocast():
            cond = assemble(drop(sd3.encode_ids(pipe, ids_of(texts)), keep | empty[:, None]))
            losses = flow_matching.loss(velocity, x0, noise.normal((16, 8, 8), **at(EPS)), t, cond)
        loss = losses.mean()
        loss.backward()
        norm = optimizer.step(seen, config.images)
        ema.update(seen, config.batch)
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    train(
        step,
        {**networks, "optimizer": optimizer, "ema": ema},
        stage="teacher",
        total_images=config.images,
        images_per_step=config.batch,
        work=work,
        metrics=metrics,
    )
    ema.copy_to(networks)
    for network in networks.values():
        network.requires_grad_(False).eval()


def untrained(config: Config, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The pipeline that training starts from, around a trained autoencoder."""
    return build(config.architecture, vae, config.seed)
