"""Matrices as functions that are fast with few tokens, and what is computed between them, in as few passes as PyTorch allows.

Up to rounding each is what PyTorch's own computes (tested). On a CPU a product of 16 to 40 tokens takes half the time if the
matrix lies in memory the other way round; nothing is held twice, the module's own weight becomes a view of it. Last bits of a
product depend on how many tokens there are where those are few, `ALONE` or fewer: fewer still with matrices turned round.

Shapes: B images or prompts, S tokens, D width, A heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""A matrix and its bias, applied to tokens (B, S, D)."""

ALONE, ALONE_TURNED = 15, 1  # on the CPUs that this was tried on; see docs/inference.md
U = math.sqrt(2 / math.pi)
TWO_U = torch.tensor(2 * U)


def product(part: Any) -> Product:
    """A matrix of ordinary numbers, turned round on a CPU; one that is rounded or adapted as it is."""
    return joined(part) if turns(part) else part  # type: ignore[no-any-return]


def turns(*parts: Any) -> bool:
    """Whether matrices are turned round: ordinary numbers in float32 on a CPU."""
    return all(plain(part) and _turns(part.weight) for part in parts)


def joined(*parts: Any) -> Product:
    """Matrices that read the same tokens as one, whose parts their own weights become; those that are rounded, one by one."""
    if not all(plain(part) for part in parts):
        return lambda x: torch.cat([part(x) for part in parts], dim=-1)
    one, out = parts[0].weight.detach(), sum(len(part.weight) for part in parts)
    weight = one.new_empty(one.shape[1], out).t() if _turns(one) else one.new_empty(out, one.shape[1])
    bias = torch.cat([part.bias.detach() for part in parts]) if parts[0].bias is not None else None
    first = 0
    for part in parts:  # one after another, so that little is in memory twice
        rows = slice(first, first := first + len(part.weight))
        part.weight.data = weight[rows].copy_(part.weight.detach())
        if bias is not None:
            part.bias.data = bias[rows]
    # as parameters, because CUDA graphs copy what is none at each replay
    return partial(F.linear, weight=_parameter(weight), bias=None if bias is None else _parameter(bias))


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _turns(weight: Tensor) -> bool:
    """Where products of few tokens are faster the other way round."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def plain(part: nn.Module) -> bool:
    """A matrix of ordinary numbers: not rounded, not adapted."""
    if type(part) is not nn.Linear or type(part.weight.data) is not Tensor:
        return False
    return bool(part.weight.dtype.is_floating_point)


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): on a CPU half the time of PyTorch's own."""
    if _otherwise(x):
        return F.gelu(x, approximate="tanh")
    return torch.addcmul(TWO_U, x, x, value=0.044715 * 2 * U).mul_(x).sigmoid_().mul_(x)


def _otherwise(x: Tensor) -> bool:
    """Where PyTorch's own kernels are the better ones: anywhere but in float32 on a CPU, step by step."""
    return x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling()


def rms_normed(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) of the last dimension: on a CPU half the time of PyTorch's own."""
    if _otherwise(x):
        return F.rms_norm(x, x.shape[-1:], None, eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(length, length.new_tensor(math.sqrt(eps * x.shape[-1]))).mul_(x.shape[-1] ** -0.5)


def attend(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """Attention of (B, A, S, K) each to (B, S, A K); settings are PyTorch's."""
    return F.scaled_dot_product_attention(q, k, v, **settings).transpose(1, 2).flatten(2)
