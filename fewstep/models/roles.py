"""Teacher, student and proxy: full copies of one transformer, each with its own claim on gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import SD3Transformer2DModel
from torch import nn


def trainable_copy(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A copy that is trained: float32 weights, gradients on, evaluation mode (SD3 has no dropout)."""
    return copy.deepcopy(transformer).float().requires_grad_(True).eval()


@torch.no_grad()
def align(proxy: nn.Module, student: nn.Module, lam: float) -> None:
    """proxy <- lam proxy + (1 - lam) student, in place: implicit distribution alignment (SenseFlow).

    Called after a student update, so that the proxy keeps up between its own. lam = 1 changes nothing,
    lam = 0 copies; 0.98 is SenseFlow's. Parameters only; an optimiser's moments are left alone.

    Raises:
        ValueError: lam is outside [0, 1], or the networks' parameters differ in name or shape.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam} (1 is off)")
    ours, theirs = dict(proxy.named_parameters()), dict(student.named_parameters())
    differing = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    )
    if differing:
        raise ValueError(f"a proxy follows a student of its own architecture, but {differing[0]} differs")
    for name, parameter in ours.items():
        parameter.lerp_(theirs[name].to(parameter), 1 - lam)


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
