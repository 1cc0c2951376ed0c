"""Frozen weights in 8 bits through torchao: a base under adapters that takes half the memory of bfloat16.

Each row of a matrix has a scale of its own; a product is computed in the type of what comes in.
"""

from __future__ import annotations

import importlib.util

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn


def quantize(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Put the matrices of the joint blocks into 8 bits, in place; embeddings, norms and biases stay as they are.

    Raises:
        ValueError: torchao is not installed.
    """
    require()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network.transformer_blocks, Int8WeightOnlyConfig())
    return network


def require() -> None:
    """Refuse where there is no torchao.

    Raises:
        ValueError: there is none; says how to get it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("weights and moments in 8 bits need torchao: pip install 'fewstep[quant]'")


def plain(weight: Tensor) -> Tensor:
    """A weight as ordinary numbers, wherever it lies."""
    weight = weight.detach()
    return weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()
