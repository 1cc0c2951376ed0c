"""Features of DINOv2 (Oquab et al. 2023): the class token behind the last norm, for Fréchet distances and the like.

dinov2          whole image squeezed to 224 x 224, as FD-DINOv2 is reported (Stein et al. 2023).
dinov2_crop     shorter side to 256, centre crop of 224, as the checkpoint's own processor does.

On square images they differ in scale alone. Positions are interpolated by transformers, a little differently from
upstream's code: distances to numbers that were made with that code are off by a small, unmeasured amount.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluate.adapters import tiny
from fewstep.evaluate.adapters.parts import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Adapter,
    Found,
    Measure,
    Pixels,
    Source,
    cropped,
    device,
    in_batches,
    model_folder,
    squared,
)

LARGE = Source("facebook/dinov2-large", ("config.json", "model.safetensors"), "Apache-2.0")


def whole(image: Pixels) -> Tensor:
    """An image squeezed to 224 x 224, normalised by ImageNet's mean and deviation: (3, 224, 224)."""
    return squared(image, 224, IMAGENET_MEAN, IMAGENET_STD)


def centre(image: Pixels) -> Tensor:
    """The middle of an image, as transformers' processor of these checkpoints cuts it: (3, 224, 224)."""
    return cropped(image, 256, 224, IMAGENET_MEAN, IMAGENET_STD)


def features(model: Any, prepare: Callable[[Pixels], Tensor]) -> Measure:
    """Class tokens (N, D) float32; prompts are not read."""
    model.to(device())
    return lambda images, _: in_batches(images, prepare, lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0])


def _model(found: Found) -> Any:
    from transformers import Dinov2Model

    opened = Dinov2Model.from_pretrained(found.model, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return opened.eval().requires_grad_(False)


ADAPTERS = (
    Adapter(
        name="dinov2",
        kind="features",
        about={"scale": "class token behind the last norm", "preprocessing": "squeezed to 224 x 224 by Pillow's bicubic"},
        licence=LARGE.licence,
        find=lambda named: Found(model_folder(LARGE, named, "dinov2")),
        load=lambda found: features(_model(found), whole),
        tiny=lambda: features(tiny.dinov2(), whole),
    ),
    Adapter(
        name="dinov2_crop",
        kind="features",
        about={
            "scale": "class token behind the last norm",
            "preprocessing": "shorter side to 256 by Pillow's bicubic, centre crop of 224",
        },
        licence=LARGE.licence,
        find=lambda named: Found(model_folder(LARGE, named, "dinov2_crop")),
        load=lambda found: features(_model(found), centre),
        tiny=lambda: features(tiny.dinov2(), centre),
    ),
)
