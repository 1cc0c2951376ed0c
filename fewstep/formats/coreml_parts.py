"""The parts of a student as Core ML takes them: graphs of tensors without what float16 breaks, and samples of their inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from fewstep import noise, solvers
from fewstep.conditioning import TextCond
from fewstep.models import canonical, sd3
from fewstep.models.canonical import Denoiser

PARTS = ("denoiser", "decoder", *sd3.ENCODERS)
SEED = 1  # of the noise that samples start from
PROMPT = "a photograph of a red cube on a wooden table"  # what text encoders are checked with


class Decoder(nn.Module):
    """Latents (B, 16, H, W), scaled as the denoiser's, to pixels (B, 3, 8H, 8W), nominally in [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae, self.scale, self.shift = vae, vae.config.scaling_factor, vae.config.shift_factor

    def forward(self, latents: Tensor) -> Tensor:
        """The image."""
        pixels: Tensor = self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]
        return pixels


class Clip(nn.Module):
    """Token ids (B, L) to what SD3 reads of a CLIP encoder: the last but one states (B, L, width), pooled (B, width)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States and pooled output."""
        out = self.encoder(ids.long(), output_hidden_states=True)
        return out.hidden_states[-2], out[0]


class T5(nn.Module):
    """Token ids (B, L) to T5's states (B, L, D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """The last states."""
        states: Tensor = self.encoder(ids.long())[0]
        return states


class SafeGroupNorm(nn.Module):
    """GroupNorm of deviations divided by each group's largest: exact in real numbers, and no square overflows in float16.

    coremltools writes a GroupNorm as means and squares in float16, where a deviation of 256 squared is infinite.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.groups = norm.weight, norm.bias, norm.eps, norm.num_groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to groups of mean 0 and unit variance, times the weight, plus the bias."""
        y = x.reshape(x.shape[0], self.groups, -1)
        y = y - y.mean(dim=-1, keepdim=True)
        largest = y.abs().amax(dim=-1, keepdim=True).clamp(min=canonical.LEAST)
        y = y / largest
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + (math.sqrt(self.eps) / largest).square())
        channels = (1, -1, *[1] * (x.ndim - 2))
        return y.reshape(x.shape) * self.weight.reshape(channels) + self.bias.reshape(channels)


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
