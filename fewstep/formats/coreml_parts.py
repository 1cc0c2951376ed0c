"""The parts of a student as Core ML takes them: graphs of tensors without what float16 breaks, and samples of their inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from fewstep import noise, solvers
from fewstep.conditioning import TextCond
from fewstep.models import canonical, sd3
from fewstep.models.canonical import T5, Clip, Decoder, Denoiser, SafeGroupNorm

PARTS = ("denoiser", "decoder", *sd3.ENCODERS)
SEED = 1  # of the noise that samples start from
PROMPT = "a photograph of a red cube on a wooden table"  # what text encoders are checked with


@dataclass(frozen=True, eq=False)
class Part:
    """What becomes a package.

    Attributes:
        graph: tensors in, a tensor or several out.
        inputs: S samples of each input, (S, 1, ...).
        outputs: names of what comes out.
    """

    graph: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]

    def samples(self) -> Iterator[dict[str, Tensor]]:
        """One call's inputs after another, (1, ...) each."""
        for i in range(len(next(iter(self.inputs.values())))):
            yield {name: tensor[i] for name, tensor in self.inputs.items()}


def prepare(
    pipe: StableDiffusion3Pipeline, name: str, cond: TextCond, grid: Sequence[float], latent: tuple[int, int, int]
) -> Part:
    """A part as a float32 graph, with samples of what it is given when the student makes an image.

    Args:
        pipe: the student; the graph shares its weights.
        name: one of `PARTS`.
        cond: a text condition of 1.
        grid: times of the student.
        latent: (16, H, W).

    Raises:
        ValueError: an encoder that the student lacks, more than one condition, or a size that it cannot have.
    """
    if name in sd3.ENCODERS:
        number, encoder = sd3.ENCODERS.index(name), getattr(pipe, name)
        if encoder is None:
            raise ValueError(f"the student has no {name} to export: leave that part out")
        clip_length = pipe.tokenizer.model_max_length
        t5_tokens = cond.tokens.shape[1] - clip_length
        if t5_tokens < 1:
            raise ValueError(f"{cond.tokens.shape[1]} text tokens, and {clip_length} are CLIP's: leave out the text encoders")
        ids = {"ids": sd3.tokenize(pipe, [PROMPT], t5_tokens)[number].to(torch.int32)[None]}
        if name == sd3.ENCODERS[-1]:
            return Part(T5(_float32(encoder)), ids, ("tokens",))
        return Part(Clip(_float32(encoder)), ids, ("tokens", "pooled"))
    if len(cond) != 1:
        raise ValueError(f"{len(cond)} text conditions: packages have a batch of 1")
    channels, height, width = latent
    network = _float32(pipe.transformer)
    if channels != network.config.in_channels or height % 2 or width % 2:
        raise ValueError(f"latents {latent}: give ({network.config.in_channels}, H, W) with H and W even")
    graph = Denoiser(canonical.safe_norms(canonical.cropped(network, max(height, width) // network.config.patch_size)))
    start = noise.normal(latent, seed=SEED, index=[0], step=0)
    made = solvers.rollout(sd3.velocity(network), start, grid, cond)
    if name == "decoder":
        return Part(Decoder(_safe_groups(_float32(pipe.vae))), {"latents": made.x[-1:]}, ("pixels",))
    steps = len(made.v)
    inputs = {
        "latents": made.x[:-1],
        "t": torch.tensor(made.grid[:-1], dtype=torch.float32)[:, None],
        "tokens": cond.tokens.float().expand(steps, 1, -1, -1),
        "pooled": cond.pooled.float().expand(steps, 1, -1),
    }
    return Part(graph, inputs, ("velocity",))


def _safe_groups(vae: AutoencoderKL) -> AutoencoderKL:
    """A copy with `SafeGroupNorm`; weights are shared."""
    made: AutoencoderKL = copy.deepcopy(vae, {id(weight): weight for weight in vae.parameters()})
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, SafeGroupNorm(child))
    return made


def _float32(network: nn.Module) -> Any:
    """The network itself, or a float32 copy of one that is narrower."""
    return network if sd3.narrow(network) is None else copy.deepcopy(network).float()
