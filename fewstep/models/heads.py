"""Discriminator heads: light networks that read the proxy's image tokens (SD3.5-Flash, stage 2; their form is ours)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def spread(layers: int, count: int) -> tuple[int, ...]:
    """Numbers of `count` blocks spread evenly over `layers`, the last one included: (5, 11, 17, 23) of 24. Ours.

    Raises:
        ValueError: fewer layers than heads, or no head.
    """
    if not 1 <= count <= layers:
        raise ValueError(f"heads = {count}: a network of {layers} blocks takes 1 to {layers} heads")
    return tuple(k * layers // count - 1 for k in range(1, count + 1))


class Head(nn.Module):
    """Tokens (B, N, width) to one logit a token (B, N): normalise, one hidden layer, one number."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, positive for real."""
        return self.out(nn.functional.silu(self.hidden(self.norm(tokens)))).squeeze(-1)


def initialise(head: Head, seed: int) -> None:
    """Give a head fresh weights that are a function of `seed`.

    The last layer starts at zero: a fresh head says 0 to everything, so that it does not push the student about
    before it has learned anything.
    """
    generator = torch.Generator().manual_seed(seed)
    width = head.hidden.in_features
    with torch.no_grad():
        head.hidden.weight.copy_(torch.randn(head.hidden.weight.shape, generator=generator) / width**0.5)
        for zeroed in (head.hidden.bias, head.out.weight, head.out.bias):
            zeroed.zero_()


def build(width: int, hidden: int, seeds: Sequence[int]) -> nn.ModuleList:
    """One head for each seed, for tokens of `width`."""
    heads = nn.ModuleList(Head(width, hidden) for _ in seeds)
    for head, seed in zip(heads, seeds, strict=True):
        initialise(head, seed)  # type: ignore[arg-type]
    return heads


def logits(heads: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
    """All heads' logits of their blocks' tokens: K times (B, N, width) to (B, K, N)."""
    return torch.stack([head(tokens) for head, tokens in zip(heads, features, strict=True)], dim=1)
