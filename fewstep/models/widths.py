"""How many bits each matrix of a denoiser gets: one table of names, which every format obeys.

What is left at 16 bits by default is 0.9 % of SD3.5-Medium's parameters and costs about 20 dB where it is rounded with
the rest: what comes in (patches, text, times) and what goes out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

KEPT = ("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out")
FULL = 16
CHOICES = (16, 8, 6, 4)

Widths = dict[str, int]
"""Bits by name of a linear module, as in `named_modules()`; what has no entry stays at 16."""


def matrices(network: nn.Module, kept: Sequence[str] = KEPT) -> dict[str, nn.Linear]:
    """The linear modules that may be rounded, by name, in the order of the network.

    Args:
        network: a denoiser, a text encoder.
        kept: names, or patterns with `*`, of modules that stay at 16 bits with all that is in them.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not any(_within(name, pattern) for pattern in kept)
    }


def uniform(network: nn.Module, bits: int, kept: Sequence[str] = KEPT) -> Widths:
    """The same width for every matrix that may be rounded.

    Raises:
        ValueError: a width that there is not.
    """
    if bits not in CHOICES:
        raise ValueError(f"{bits} bits: give one of {', '.join(map(str, CHOICES))}")
    return dict.fromkeys(matrices(network, kept), bits) if bits != FULL else {}


def average(network: nn.Module, widths: Mapping[str, int], kept: Sequence[str] = KEPT) -> float:
    """Bits of an average weight among those that may be rounded; scales and offsets of a format come on top."""
    sizes = {name: module.weight.numel() for name, module in matrices(network, kept).items()}
    return sum(widths.get(name, FULL) * n for name, n in sizes.items()) / sum(sizes.values()) if sizes else FULL


def _within(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))
