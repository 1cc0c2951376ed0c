"""Teacher, student and proxy: full copies of one transformer, each with its own claim on gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import SD3Transformer2DModel
from torch import nn


def trainable_copy(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A copy that is trained: float32 weights, gradients on, evaluation mode (SD3 has no dropout)."""
    return copy.deepcopy(transformer).float().requires_grad_(True).eval()


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Gradients pass through these networks but do not reach their weights, inside the block."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
