"""Networks as exports take them: nothing in the file that no image needs, and no operation that half precision breaks.

Every format starts from here, so that what a target lacks is rewritten in one place. The source is ours.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from fewstep.models import adapters
from fewstep.models.sd3 import TRAIN_TIMESTEPS

LEAST = 2.0**-7  # divisor of `SafeRMSNorm`: eps / LEAST^2 is still a number in half precision


class Denoiser(nn.Module):
    """The velocity as a graph: tensors in, a tensor out.

    Inputs are `latents` (B, 16, H, W), `t` (B,) in [0, 1], `tokens` (B, L, D) and `pooled` (B, P); output is (B, 16, H, W).
    """

    def __init__(self, network: SD3Transformer2DModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """The velocity eps - x0 at (latents, t)."""
        out: Tensor = self.network(
            hidden_states=latents,
            timestep=t * TRAIN_TIMESTEPS,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return out


class Decoder(nn.Module):
    """Scaled latents to pixels; scale and shift are in the graph."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.network = vae

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 16, H, W) to (B, 3, 8H, 8W)."""
        config = self.network.config
        pixels: Tensor = self.network.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return pixels


class Clip(nn.Module):
    """What SD3 reads of a CLIP: the last but one hidden states, and the projected pooled output."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.network = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) to (B, L, width) and (B, width)."""
        out = self.network(ids.long(), output_hidden_states=True)
        return out.hidden_states[-2], out[0]


class T5(nn.Module):
    """T5's hidden states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.network = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) to (B, L, D)."""
        hidden: Tensor = self.network(ids.long())[0]
        return hidden


class SafeRMSNorm(nn.Module):
    """Diffusers' RMSNorm, divided by each row's largest value first: exact in real numbers, and no square overflows.

    In float16 x * x is infinite from |x| = 256, and a converter that drops the upcast returns zeros.
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., D) to rows of unit mean square, times the weight."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST)
        y = x / largest
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + (math.sqrt(self.eps) / largest).square())
        return y if self.weight is None else y * self.weight


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
        largest = y.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST)
        y = y / largest
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + (math.sqrt(self.eps) / largest).square())
        channels = (1, -1, *[1] * (x.ndim - 2))
        return y.reshape(x.shape) * self.weight.reshape(channels) + self.bias.reshape(channels)


def safe_norms(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A copy whose norms of queries and keys are `SafeRMSNorm`; weights are shared with the original."""
    made = adapters.share(network)
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, SafeRMSNorm(child))
    return made


def cropped(network: SD3Transformer2DModel, side: int) -> SD3Transformer2DModel:
    """A copy with the middle of the position table alone, bit-exact up to that size; other weights are shared.

    SD3.5-Medium's table is 0.42 GiB in 16 bits; images of 1024 pixels need 0.01 of it.

    Args:
        network: the denoiser.
        side: patches along the longest side of an image (pixels / 16).

    Raises:
        ValueError: more than the network has, or fewer than 1.
    """
    there = network.config.pos_embed_max_size
    if not 1 <= side <= there:
        raise ValueError(f"a table of {side} x {side} positions: the network has {there} x {there}")
    side += (there - side) % 2  # so that the middle stays the middle
    made = adapters.share(network)
    table = made.pos_embed.pos_embed.reshape(1, there, there, -1)
    cut = (there - side) // 2
    table = table[:, cut : cut + side, cut : cut + side].reshape(1, side * side, -1).clone()
    made.pos_embed.register_buffer("pos_embed", table, persistent=True)
    made.pos_embed.pos_embed_max_size = side
    made.register_to_config(pos_embed_max_size=side)
    return made
