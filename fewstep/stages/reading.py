"""Text encoders of the bundled teacher learn to read: every noun token and every pooled vector tells what is asked.

SD3's encoders have read the internet before the transformer meets them, and stay as they are. Ours read the grammar: they
are trained to say, through linear probes that are thrown away, what each thing of a caption is, and are frozen (ours).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.conditioning import EncoderOutputs
from fewstep.engine.loop import train
from fewstep.engine.optim import Optim, Optimizer
from fewstep.models import sd3
from fewstep.worlds.shapes.architecture import MAX_TOKENS
from fewstep.worlds.shapes.grammar import PLURAL, Ask
from fewstep.worlds.shapes.prompts import caption, training_ask
from fewstep.worlds.shapes.scene import COLORS, RELATIONS, SHAPES, SIZES

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
NOUNS = {*SHAPES, *PLURAL.values()}
ROLES = (None, *RELATIONS, "larger than")
# Classes of each fact. Of a thing: shape, colour, size, number, 0 meaning open. Of a noun that can see the whole caption
# also its role, on either side of the relation. Of a caption: two things, 0 meaning there is none, and the relation.
THING = (len(SHAPES) + 1, len(COLORS) + 1, len(SIZES) + 1, 5)
NOUN = (*THING, 2 * len(ROLES))
CAPTION = (*THING, *THING, len(ROLES))


@dataclass(frozen=True)
class Config:
    """How the encoders learn to read.

    Attributes:
        captions: captions read.
        batch: captions a step.
        optim: optimiser.
    """

    captions: int = 38_400
    batch: int = 128
    optim: Optim = field(
        default_factory=lambda: Optim(
            lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_images=6_400, final_lr_ratio=0.01
        )
    )


def facts(ask: Ask) -> tuple[list[list[int]], list[int]]:
    """What a caption says, as classes: one row of `NOUN` for each thing, and one row of `CAPTION`."""
    things = [
        [
            SHAPES.index(w.shape) + 1 if w.shape else 0,
            COLORS.index(w.color) + 1 if w.color else 0,
            SIZES.index(w.size) + 1 if w.size else 0,
            count,
        ]
        for w, count in zip(ask.things, ask.counts, strict=True)
    ]
    relation = ROLES.index(ask.relation)
    nouns = [[*thing, relation + len(ROLES) * second] for second, thing in enumerate(things)]
    return nouns, [*things[0], *(things[1] if len(things) > 1 else [0] * len(THING)), relation]


class Probes(nn.Module):
    """Linear readers of a noun's tokens (CLIP-L, CLIP-G, T5) and of the pooled vectors (CLIP-L, CLIP-G)."""

    def __init__(self, clip_l_width: int, clip_g_width: int, t5_width: int) -> None:
        super().__init__()
        # CLIP reads from left to right, so its first noun cannot know what it stands in a relation to.
        self.clip_l = nn.Linear(clip_l_width, sum(THING))
        self.clip_g = nn.Linear(clip_g_width, sum(THING))
        self.t5 = nn.Linear(t5_width, sum(NOUN))
        self.pooled_l = nn.Linear(clip_l_width, sum(CAPTION))
        self.pooled_g = nn.Linear(clip_g_width, sum(CAPTION))

    def forward(self, outputs: EncoderOutputs, row: Tensor, word: Tensor) -> tuple[Tensor, ...]:
        """Logits of three readers of nouns (N, classes), then two of captions (B, classes).

        Args:
            outputs: of a batch of B captions.
            row, word: (N,) each: which caption a noun is in, and its position among the words.
        """
        return (
            self.clip_l(outputs.clip_l_tokens[row, word + 1]),  # after the start mark
            self.clip_g(outputs.clip_g_tokens[row, word + 1]),
            self.t5(outputs.t5_tokens[row, word]),
            self.pooled_l(outputs.clip_l_pooled),
            self.pooled_g(outputs.clip_g_pooled),
        )


def loss(logits: Tensor, classes: tuple[int, ...], truth: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of all facts, and which rows have every fact right.

    Args:
        logits: (N, sum of `classes`).
        classes: how many classes each fact has.
        truth: (N, at least as many facts) int64; further facts are left out.

    Returns:
        scalar, and (N,) bool.
    """
    parts = logits.float().split(classes, dim=1)
    columns = truth.unbind(1)[: len(parts)]
    entropy = torch.stack([F.cross_entropy(p, c) for p, c in zip(parts, columns, strict=True)]).sum()
    return entropy, torch.stack([p.argmax(1) == c for p, c in zip(parts, columns, strict=True)]).all(0)


def batch_of(seed: int, first: int, count: int) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """Captions by address: texts, facts of their nouns (N, 5), row and word of each noun (N,), facts of captions (B, 9)."""
    texts: list[str] = []
    nouns, rows, words, captions = [], [], [], []
    for i in range(count):
        rng = np.random.default_rng([seed, first + i])
        ask = training_ask(rng)
        texts.append(caption(ask, rng))
        of_nouns, of_caption = facts(ask)
        nouns += of_nouns
        captions.append(of_caption)
        found = [j for j, word in enumerate(texts[-1].split()) if word in NOUNS]
        rows += [i] * len(found)
        words += found
    return texts, torch.tensor(nouns), torch.tensor(rows), torch.tensor(words), torch.tensor(captions)


def run(config: Config, pipe: StableDiffusion3Pipeline, seed: int, work: Path, metrics: Path) -> None:
    """Train `pipe`'s encoders in place and freeze them; the probes are thrown away. Resumes from `work`.

    Raises:
        FloatingPointError: when the loss is not finite.
    """
    encoders = {name: getattr(pipe, name).requires_grad_(True).train() for name in ENCODERS}
    widths = [encoder.config.hidden_size for encoder in encoders.values()]
    torch.manual_seed(seed)
    networks: dict[str, Any] = {**encoders, "probes": Probes(*widths)}
    named = [(f"{n}.{p}", w) for n, network in networks.items() for p, w in network.named_parameters()]
    optimizer = Optimizer(named, config.optim)

    def step(seen: int) -> dict[str, float]:
        texts, nouns, rows, words, captions = batch_of(seed, seen, config.batch)
        outputs = sd3.encode_ids(pipe, sd3.tokenize(pipe, texts, MAX_TOKENS))
        clip_l, clip_g, t5, pooled_l, pooled_g = networks["probes"](outputs, rows, words)
        results = {
            "clip_l": loss(clip_l, THING, nouns),
            "clip_g": loss(clip_g, THING, nouns),
            "t5": loss(t5, NOUN, nouns),
            "pooled_l": loss(pooled_l, CAPTION, captions),
            "pooled_g": loss(pooled_g, CAPTION, captions),
        }
        total = torch.stack([entropy for entropy, _ in results.values()]).sum()
        total.backward()
        norm = optimizer.step(seen, config.captions)
        shares = {f"right_{name}": float(right.float().mean()) for name, (_, right) in results.items()}
        return {"loss": float(total.detach()), "grad_norm": float(norm), **shares}

    train(
        step,
        {**networks, "optimizer": optimizer},
        stage="teacher.reading",  # where its settings are, for the loop's errors
        total_images=config.captions,
        images_per_step=config.batch,
        work=work,
        metrics=metrics,
    )
    for encoder in encoders.values():
        encoder.requires_grad_(False).eval()
