"""The denoiser's forward pass with everything known in advance taken out of it; the modules stay diffusers' own.

A student visits few times, so all that looks only at time and prompt (embeddings of time and text, every modulation, a third
of the weights) is computed once a prompt, as the projected context is. Within a block, query, key and value are one product,
scales and gates are fused with their sums, and the last block's context, which nobody reads, asks no queries. Up to rounding
this is the network's own `forward` (tested).

Shapes: B images, N image tokens, L context tokens, S = N + L, D width, A heads, K head width, R rows of modulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from fewstep.conditioning import TextCond
from fewstep.models import adapters, modulation, sd3
from fewstep.models.sd3 import TRAIN_TIMESTEPS
from fewstep.serve.products import (
    ALONE,
    ALONE_TURNED,
    Product,
    attend,
    gelu,
    joined,
    product,
    rms_normed,
    turns,
)

EPS = 1e-6  # of every LayerNorm of SD3
SCALES = {9: (1, 4, 7), 6: (1, 4), 2: (0,)}  # rows that are scales, by the number of rows: the network adds 1 to them


class Known(NamedTuple):
    """What of a prompt does not change along its steps.

    Attributes:
        context: (L, D), projected.
        modulations: (steps, R, 1, D): all rows of all blocks, 1 added to scales.
    """

    context: Tensor
    modulations: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Attention:
    """An attention: what it reads of image and context, and where its results go; without context, the image's alone.

    Attributes:
        image, context: queries, keys and values of each kind of tokens, (B, S, 3 A K).
        out, out_context: what becomes of its results.
        heads: A.
        eps: of the norms of queries and keys.
        norms: their weights (2, K) for each kind of tokens; empty where there are none.
    """

    image: Product
    context: Product | None
    out: Product
    out_context: Product | None
    heads: int
    eps: float
    norms: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A joint block: its attention, its second one among image tokens alone, and what follows, of image and context."""

    attention: Attention
    second: Attention | None
    feed: Product
    feed_context: Product | None


@dataclass(frozen=True, eq=False)
class Fast:
    """A denoiser, prepared.

    Attributes:
        network: whose modules are used.
        blocks: its joint blocks.
        adaln: all its matrices of adaLN as one, in the order in which their rows are taken.
        ones: what the network adds to these rows, (R, 1, 1): 1 to scales, 0 to others.
        least: times that are computed together at least, so that last bits are the same for any number.
    """

    network: Any
    blocks: tuple[Block, ...]
    adaln: Product
    ones: Tensor
    least: int


def fits(network: Any) -> bool:
    """Whether a denoiser is built as this file expects; others run by their own `forward`."""
    if not isinstance(network, SD3Transformer2DModel) or adapters.has(network):
        return False
    names, blocks = ("norm_q", "norm_k", "norm_added_q", "norm_added_k"), network.transformer_blocks
    norms = [getattr(a, name) for b in blocks for a in (b.attn, b.attn2) if a is not None for name in names]
    return all(n is None or (isinstance(n, RMSNorm) and n.weight is not None and n.bias is None) for n in norms)


def prepare(network: SD3Transformer2DModel) -> Fast:
    """Join matrices that read the same tokens. Their own weights become views of what is joined: no memory is spent."""
    blocks = tuple(_read(block) for block in network.transformer_blocks)
    modules = [network.get_submodule(name) for name in modulation.names(network)]
    ones: list[float] = []
    for module in modules:
        rows = int(module.out_features) // network.inner_dim  # type: ignore[arg-type]
        ones += [float(row in SCALES[rows]) for row in range(rows)]
    embedders = [part for part in network.time_text_embed.modules() if isinstance(part, nn.Linear)]
    least = 1 + (ALONE_TURNED if turns(*modules, *embedders) else ALONE)
    for part in embedders:
        product(part)  # which turns it round
    made = torch.tensor(ones, dtype=sd3.narrow(network) or torch.float32, device=network.device)[:, None, None]
    return Fast(network, blocks, joined(*modules), made, least)


@torch.no_grad()
def know(fast: Fast, times: Sequence[float], cond: TextCond) -> list[Known]:
    """What is computed once for each prompt; the same, bit for bit on a CPU, for a prompt alone.

    Args:
        fast: the denoiser.
        times: at which steps start; the same prompt is known again for others.
        cond: of the prompts.
    """
    network, count = fast.network, len(times)
    cond = cond.to(fast.ones.device, fast.ones.dtype)
    padded = list(times) + [times[-1]] * (fast.least - count)
    timestep = torch.tensor(padded * len(cond), dtype=torch.float32, device=fast.ones.device) * TRAIN_TIMESTEPS
    embedding = F.silu(network.time_text_embed(timestep, cond.pooled.repeat_interleave(len(padded), dim=0)))
    made = fast.adaln(embedding).view(len(cond), len(padded), len(fast.ones), 1, -1)[:, :count] + fast.ones
    return [Known(*pair) for pair in zip(network.context_embedder(cond.tokens), made, strict=True)]


def weight(known: Known) -> int:
    """Bytes of what is known of a prompt."""
    return known.context.nbytes + known.modulations.nbytes


Forward = Callable[[Fast, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]


class Batch:
    """Prompts that are drawn together: velocities of their images at any of their steps.

    Args:
        fast: the denoiser.
        known: of each prompt.
        height, width: of the latents.
        run: `forward`, or a compiled one.
    """

    def __init__(self, fast: Fast, known: Sequence[Known], height: int, width: int, run: Forward | None = None) -> None:
        self._fast, self._size, self._run = fast, (height, width), run or forward
        if len(known) == 1:  # nothing needs to be copied
            self._context, self._modulations = known[0].context[None], known[0].modulations[:, None]
        else:
            self._context = torch.stack([k.context for k in known])
            self._modulations = torch.stack([k.modulations for k in known], dim=1)  # (steps, B, R, 1, D)
        self._positions = positions(fast.network, height, width)
        self._scales = norms(fast, self._positions.shape[1], self._context.shape[1])

    def velocity(self, x: Tensor, step: int) -> Tensor:
        """Of latents (B, 16, H, W) at the start of a step, from 0; float32, where `x` is."""
        tokens = patches(x.to(self._context.device, self._context.dtype), self._fast.network.config.patch_size)
        out = self._run(self._fast, tokens, self._positions, self._context, self._modulations[step], self._scales)
        return images(out, self._fast.network.config.patch_size, *self._size).to(x.device, torch.float32)


def forward(
    fast: Fast, tokens: Tensor, positions: Tensor, context: Tensor, modulations: Tensor, scales: Sequence[Tensor]
) -> Tensor:
    """Patches (B, N, C p p), positions (1, N, D), context (B, L, D), modulations (B, R, 1, D): velocities (B, N, p p C)."""
    proj, rows = fast.network.pos_embed.proj, iter(modulations.unbind(1))
    # a product, because a convolution's last bits depend on how many images there are
    image = F.linear(tokens, proj.weight.flatten(1), proj.bias) + positions
    for block, scale in zip(fast.blocks, scales, strict=True):
        image, context = _block(block, image, context, rows, scale)
    scale, shift = next(rows), next(rows)
    out: Tensor = fast.network.proj_out(_modulated(_normed(image), shift, scale))
    return out


def compiled(device: torch.device, notes: list[str]) -> Forward:
    """`forward`, compiled by torch's inductor when it is first called: on a GPU with CUDA graphs; without a compiler as it is.

    Args:
        device: where it runs.
        notes: where it is said why it is not compiled.
    """
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        notes.append(f"not compiled, because there is no C++ compiler ({str(error).splitlines()[0]})")
        return forward
    made: Forward = torch.compile(forward, mode="reduce-overhead" if device.type == "cuda" else None)
    return made


def positions(network: SD3Transformer2DModel, height: int, width: int) -> Tensor:
    """The part of the table of positions for latents of a size, (1, N, D)."""
    table: Tensor = network.pos_embed.cropped_pos_embed(height, width)
    return table.to(network.pos_embed.proj.weight.device, network.pos_embed.proj.weight.dtype)


def norms(fast: Fast, image: int, context: int) -> list[Tensor]:
    """Weights of the norms of queries and keys, one (S, 2, 1, K) a block for all tokens; empty where there are none."""
    made = []
    for block in fast.blocks:
        pairs = zip(block.attention.norms, (image, context), strict=False)
        parts = [pair.expand(count, -1, -1) for pair, count in pairs]
        made.append(torch.cat(parts)[:, :, None] if parts else torch.empty(0))
    return made


def patches(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) to (B, N, C p p)."""
    cut = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def images(tokens: Tensor, p: int, height: int, width: int) -> Tensor:
    """(B, N, p p C) to (B, C, H, W)."""
    folded = tokens.view(len(tokens), height // p, width // p, p, p, -1)
    return folded.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height, width)


def _block(block: Block, image: Tensor, context: Tensor, rows: Iterator[Tensor], norm: Tensor) -> tuple[Tensor, Tensor]:
    """One joint block: image (B, N, D) and context (B, L, D) to what they become; the last block's context stays."""
    attention, second = block.attention, None
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = islice(rows, 6)
    normed = _normed(image)
    if block.second is not None:
        shift_2, scale_2, gate_2 = islice(rows, 3)
        second = gate_2 * _alone(block.second, _modulated(normed, shift_2, scale_2))
    if block.feed_context is None:
        c_scale, c_shift = islice(rows, 2)
    else:
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = islice(rows, 6)
    read = _modulated(_normed(context), c_shift, c_scale)
    seen, said = _joint(attention, _modulated(normed, shift, scale), read, norm)
    image = torch.addcmul(image, gate, seen)
    image = image if second is None else image + second
    image = torch.addcmul(image, gate_mlp, block.feed(_modulated(_normed(image), shift_mlp, scale_mlp)))
    if block.feed_context is not None:
        context = torch.addcmul(context, c_gate, said)
        told = block.feed_context(_modulated(_normed(context), c_shift_mlp, c_scale_mlp))
        context = torch.addcmul(context, c_gate_mlp, told)
    return image, context


def _joint(made: Attention, image: Tensor, context: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of both over both; in the last block the image alone asks."""
    assert made.context is not None
    count = image.shape[1]
    read = torch.cat([made.image(image), made.context(context)], dim=1)
    query, key, value = _heads(made, read, norm)
    if made.out_context is None:
        out = made.out(attend(query[:, :, :count], key, value))
        return out, out
    out = attend(query, key, value)
    return made.out(out[:, :count]), made.out_context(out[:, count:])


def _alone(made: Attention, image: Tensor) -> Tensor:
    """Attention of the image over itself."""
    norm = made.norms[0][:, None] if made.norms else image.new_empty(0)
    return made.out(attend(*_heads(made, made.image(image), norm)))


def _heads(made: Attention, read: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, 3 A K) to queries, keys and values (B, A, S, K), the first two normed."""
    batch, length, width = read.shape
    apart = read.view(batch, length, 3, made.heads, width // (3 * made.heads))
    if not norm.numel():
        query, key, value = apart.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value
    pairs = rms_normed(apart[:, :, :2], made.eps) * norm
    query, key = pairs.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, apart[:, :, 2].transpose(1, 2)


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed * scale + shift; the scale has its 1 already."""
    return torch.addcmul(shift, normed, scale)


def _read(block: Any) -> Block:
    attn, own, last = block.attn, block.attn2, block.context_pre_only
    norms = tuple(
        torch.stack([q.weight, k.weight])
        for q, k in ((attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k))
        if q is not None
    )
    attention = Attention(
        joined(attn.to_q, attn.to_k, attn.to_v),
        joined(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        product(attn.to_out[0]),
        None if last else product(attn.to_add_out),
        attn.heads,
        attn.norm_q.eps if norms else EPS,
        norms,
    )
    second = None
    if own is not None:
        norms = (torch.stack([own.norm_q.weight, own.norm_k.weight]),) if own.norm_q is not None else ()
        read, out = joined(own.to_q, own.to_k, own.to_v), product(own.to_out[0])
        second = Attention(read, None, out, None, own.heads, own.norm_q.eps if norms else EPS, norms)
    return Block(attention, second, _fed(block.ff), None if last else _fed(block.ff_context))


def _fed(feed: Any) -> Product:
    """A feed-forward of SD3: two matrices with a GELU, by tanh, between them."""
    up, down = product(feed.net[0].proj), product(feed.net[2])
    return lambda x: down(gelu(up(x)))
