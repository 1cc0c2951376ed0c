"""Features of Inception-v3 for FID: 2048 numbers before the last layer, by torch-fidelity's port of the TensorFlow network.

inception_legacy   images as they are; the network resizes them to 299 x 299 as TensorFlow 1 did (torch-fidelity's own FID).
inception_clean    resized before by Pillow's bicubic filter on floats, clipped, rounded: clean-fid's preprocessing (Parmar et
                   al. 2022) but for the rounding, because this port reads bytes.

torch-fidelity imports torchvision, and a torchvision that was built for another torch breaks the process that imports it;
so nothing is imported before features are asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.evaluate.adapters.parts import (
    BATCH,
    Adapter,
    Found,
    Measure,
    Pixels,
    device,
    exact,
    weights_file,
)

SIZE, FEATURES = 299, "2048"
PIP = "pip install 'fewstep[metrics]'"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
HOW = (
    f"Get {WEIGHTS} from the releases of github.com/toshas/torch-fidelity (v0.2.0; Apache-2.0), then "
    "python examples/convert_pt.py FILE {path}"
)


def clean(image: Pixels) -> Pixels:
    """An image (H, W, 3) resized to 299 x 299 channel by channel in floats, clipped and rounded."""
    planes = [Image.fromarray(image[..., channel].astype(np.float32)) for channel in range(3)]
    resized = [np.asarray(plane.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for plane in planes]
    rounded: Pixels = np.rint(np.stack(resized, axis=-1).clip(0, 255)).astype(np.uint8)
    return rounded


def as_is(image: Pixels) -> Pixels:
    """An image as it is: the network resizes it."""
    return image


def extractor(file: Path) -> Any:
    """torch-fidelity's network with weights of a safetensors file.

    Raises:
        ValueError: torch-fidelity or a matching torchvision is missing, or the weights are of another network.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(f"inception needs torch-fidelity and torchvision ({error}): {PIP}. On a CPU build of torch take "
                         "torchvision from the index that torch came from") from None
    except Exception as error:  # an operator of torchvision that this torch does not have; no class of its own
        raise ValueError(f"torchvision does not fit torch {torch.__version__} ({str(error)[:120]}): install it from the index "
                         "that torch came from, in the version that belongs to this torch") from None
    from safetensors.torch import load_file

    # Its constructor reads a file of torch's own format, or downloads one. It is given one that we write from safetensors.
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / WEIGHTS
        torch.save(load_file(file), own)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", [FEATURES], feature_extractor_weights_path=str(own))
        except RuntimeError as error:
            said = " ".join(str(error).split())[:160]
            raise ValueError(f"{file} does not fit Inception-v3 ({said}). {HOW.format(path=file)}") from None
    return network.eval().requires_grad_(False).to(device())


def features(network: Callable[[Tensor], Any], prepare: Callable[[Pixels], Pixels]) -> Measure:
    """Features (N, 2048) float32; prompts are not read. Images of one size that follow each other go in one batch."""

    def measure(images: Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        found: list[Tensor] = []
        with exact():
            for batch in runs(images, prepare):
                pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()
                found.append(network(pixels.to(device()))[0].float().cpu())
        return torch.cat(found)

    return measure


def runs(images: Sequence[Pixels], prepare: Callable[[Pixels], Pixels]) -> list[list[Pixels]]:
    """Prepared images in their order, cut where the size changes and after `BATCH`."""
    out: list[list[Pixels]] = []
    for image in map(prepare, images):
        if not out or out[-1][0].shape != image.shape or len(out[-1]) == BATCH:
            out.append([])
        out[-1].append(image)
    return out


def _adapter(name: str, prepare: Callable[[Pixels], Pixels], preprocessing: str) -> Adapter:
    return Adapter(
        name=name,
        kind="features",
        about={"scale": "2048 features before the last layer", "preprocessing": preprocessing},
        licence="Apache-2.0",
        find=lambda named: Found(weights_file(named, "inception", HOW)),
        load=lambda found: features(extractor(found.model), prepare),
        tiny=None,
        needs="torch_fidelity",
    )


ADAPTERS = (
    _adapter("inception_legacy", as_is, "resized to 299 x 299 inside the network as by TensorFlow 1"),
    _adapter("inception_clean", clean, "resized to 299 x 299 by Pillow's bicubic on floats, rounded"),
)
