"""Latents to pixels: whole or in tiles, the same in any batch, and cheap previews of images on their way.

A preview of a small image is the real decoder's. Of a large one it is a linear map of each latent position to one colour,
fitted once by least squares to the decoder itself on latents of the model's own: blurred, an eighth of the size, free.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from numpy.typing import NDArray
from torch import Tensor, nn

from fewstep.models import sd3

WHOLE = 1024 * 1024  # pixels of an image above which it is decoded in tiles: whole, these take 2 GiB in 16 bits
REAL_PREVIEW = 128 * 128  # pixels up to which a preview is decoded by the real decoder
FITTED = 16  # latent positions along the sides of what the linear map is fitted on


@torch.no_grad()
def pixels(vae: Any, x0: Tensor) -> Tensor:
    """Latents (B, 16, H, W), scaled, to pixels (B, 3, 8H, 8W), nominally in [-1, 1], float32 on the CPU.

    On a CPU one image at a time: how a convolution is divided among threads, and so its last bits, depends on how many there
    are. Above `WHOLE` pixels in tiles, whose borders are blended.
    """
    tiled = 64 * x0.shape[-1] * x0.shape[-2] > WHOLE
    (vae.enable_tiling if tiled else vae.disable_tiling)()
    parts = x0.split(1 if next(vae.parameters()).device.type == "cpu" else len(x0))
    try:
        return torch.cat([sd3.decode(SimpleNamespace(vae=vae), part) for part in parts])
    finally:
        vae.disable_tiling()


def prepare(vae: Any) -> None:
    """Let go of the encoder, which drawing never asks; on a CPU, the order of numbers that convolutions are fastest with."""
    vae.encoder = vae.quant_conv = None
    if fits(vae.decoder):
        vae.decoder = Lean(vae.decoder)
    if vae.device.type == "cpu":
        vae.to(memory_format=torch.channels_last)


def fits(decoder: Any) -> bool:
    """Whether a decoder is built of what `Lean` knows, as SD3's is."""
    if not isinstance(decoder, Decoder) or not all(type(block) is UpDecoderBlock2D for block in decoder.up_blocks):
        return False
    blocks = [*decoder.mid_block.resnets, *(resnet for up in decoder.up_blocks for resnet in up.resnets)]
    ups = [up for block in decoder.up_blocks for up in block.upsamplers or ()]
    plain = all(
        type(b) is ResnetBlock2D and type(b.nonlinearity) is nn.SiLU and b.time_emb_proj is None and b.output_scale_factor == 1
        for b in blocks
    )
    return plain and all(type(up) is Upsample2D and up.interpolate and up.norm is None and up.name == "conv" for up in ups)


class Lean(nn.Module):
    """A decoder's own modules, asked so that sums and activations take no memory of their own; the same numbers.

    Args:
        decoder: one that fits.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, 16, H, W), not scaled, to pixels (B, 3, 8H, 8W)."""
        decoder = self.decoder
        first, *rest = decoder.mid_block.resnets
        x = _resnet(first, decoder.conv_in(x))
        for attention, resnet in zip(decoder.mid_block.attentions, rest, strict=True):
            x = _resnet(resnet, x if attention is None else attention(x))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = _resnet(resnet, x)
            for up in block.upsamplers or ():
                x = up.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return decoder.conv_out(_activated(decoder.conv_norm_out, x))  # type: ignore[no-any-return]


def _resnet(block: Any, x: Tensor) -> Tensor:
    made: Tensor = block.conv2(_activated(block.norm2, block.conv1(_activated(block.norm1, x))))
    return made.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.silu(norm(x), inplace=True)


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W), nominally in [-1, 1], to (B, H, W, 3)."""
    made: NDArray[np.uint8] = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return made


class Preview:
    """Pictures of data predictions on their way.

    Args:
        decode: the real decoder, latents to pixels.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        self._decode = decode
        self._map: Tensor | None = None

    def __call__(self, x0: Tensor) -> NDArray[np.uint8]:
        """Latents (B, 16, H, W) to (B, 8H, 8W, 3), or (B, H, W, 3) where they are large."""
        if 64 * x0.shape[-1] * x0.shape[-2] <= REAL_PREVIEW:
            return to_uint8(self._decode(x0))
        if self._map is None:
            self._map = fit(self._decode, x0)
        return to_uint8(torch.einsum("bchw,cd->bdhw", x0, self._map[:-1]) + self._map[-1].reshape(1, 3, 1, 1))


@torch.no_grad()
def fit(decode: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """The linear map (17, 3) from a latent position to the mean colour of its 8 x 8 pixels; the last row is the offset.

    Args:
        decode: latents to pixels.
        x0: (B, 16, H, W) latents; a middle part of a few of them, and noise around their mean, is what it is fitted on.
    """
    side = min(FITTED, *x0.shape[-2:])
    top, left = (x0.shape[-2] - side) // 2, (x0.shape[-1] - side) // 2
    own = x0[:4, :, top : top + side, left : left + side]
    mean, spread = own.mean((0, 2, 3), keepdim=True), own.std((0, 2, 3), keepdim=True)
    made = mean + spread * torch.randn(4, *own.shape[1:], generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(nn.functional.avg_pool2d(made, 4), scale_factor=4) if side % 4 == 0 else made
    latents = torch.cat([own, smooth])
    colours = nn.functional.avg_pool2d(decode(latents), 8).permute(0, 2, 3, 1).reshape(-1, 3)
    rows = latents.permute(0, 2, 3, 1).reshape(len(colours), -1)
    return torch.linalg.lstsq(torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1), colours).solution

