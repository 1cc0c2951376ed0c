"""A pipeline folder in 8 bits that stock diffusers opens, through torchao: denoiser, and text encoders if wanted.

Each row of a matrix has a scale of its own. Weights alone are rounded, or in products what comes in, too ("dynamic", which is
faster where the hardware multiplies integers and the model is compiled). torchao has "int6" and "int4" that run on a CPU,
but stores them in 8 bits: they are not sold as 6 and 4 here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers import TorchAoConfig as ForDiffusers
from torch import nn

from fewstep.models import eight_bit, sd3, widths

BITS = 8
ENCODERS = ("CLIPTextModelWithProjection", "T5EncoderModel")


def require() -> None:
    """Refuse where there is no torchao.

    Raises:
        ValueError: there is none; says how to get it.
    """
    eight_bit.require()


def write(network: SD3Transformer2DModel, folder: Path, planned: Mapping[str, int], dynamic: bool = False) -> None:
    """Write a denoiser as a folder that diffusers opens in 8 bits; what is not rounded is stored in bfloat16.

    Args:
        network: the denoiser; it is left as it is.
        folder: target, part of an artefact that is being written.
        planned: which matrices are rounded: all their widths must be 8.
        dynamic: round what comes into a product, too.

    Raises:
        ValueError: no torchao, or another width than 8.
    """
    require()
    check(planned)
    left = [name for name in widths.matrices(network, kept=()) if name not in planned]
    with TemporaryDirectory(dir=folder.parent) as plain:
        sd3.save_half(network, Path(plain))
        rounded = SD3Transformer2DModel.from_pretrained(
            plain,
            quantization_config=ForDiffusers(_scheme(dynamic), modules_to_not_convert=left),
            torch_dtype=torch.bfloat16,
            local_files_only=True,
        )
        rounded.register_to_config(_name_or_path="")
        rounded.save_pretrained(folder)


def write_encoder(source: Path, folder: Path) -> None:
    """Write one of transformers' text encoders in 8 bits; embeddings and norms are stored in bfloat16.

    Args:
        source: folder of the encoder.
        folder: target, part of an artefact that is being written.

    Raises:
        ValueError: no torchao, or no text encoder.
    """
    require()
    import transformers

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = [name for name in config.get("architectures") or () if name in ENCODERS]
    if not names:
        raise ValueError(f"{source} is no text encoder of SD3: its config.json names none of {', '.join(ENCODERS)}")
    asked = transformers.TorchAoConfig(_scheme(False))
    kind = getattr(transformers, names[0])
    rounded = kind.from_pretrained(source, quantization_config=asked, dtype=torch.bfloat16, local_files_only=True)
    rounded.save_pretrained(folder)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A matrix (out, in) after its round trip through 8 bits, as `write` stores it; float32."""
    require()
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
    quantize_(layer, _scheme(False))
    return eight_bit.plain(layer.weight).float()


def check(planned: Mapping[str, int], formats: Sequence[str] = ("gguf", "coreml")) -> None:
    """Refuse widths that torchao does not pack.

    Raises:
        ValueError: names a matrix and the formats that have its width.
    """
    for name, bits in planned.items():
        if bits != BITS:
            raise ValueError(f"{name}: torchao packs {BITS} bits, not {bits}; --to {' or '.join(formats)} does")


def _scheme(dynamic: bool) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig()
