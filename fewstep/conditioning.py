"""What a model is told: token and pooled text features, in the layout of SD3.

L is text tokens, D the token width (T5's), P the pooled width (CLIP-L + CLIP-G).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TextCond:
    """A batch of text conditions.

    Attributes:
        tokens: (B, L, D).
        pooled: (B, P).
    """

    tokens: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.pooled.ndim != 2 or len(self.tokens) != len(self.pooled):
            raise ValueError(
                f"TextCond needs tokens (B, L, D) and pooled (B, P), got {tuple(self.tokens.shape)} and "
                f"{tuple(self.pooled.shape)}"
            )

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, index: int | slice | Tensor) -> "TextCond":
        """Rows by slice or LongTensor; an int gives a batch of 1."""
        if isinstance(index, int):
            index = torch.tensor([index], device=self.pooled.device)
        return TextCond(self.tokens[index], self.pooled[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TextCond":
        """Copies to a device and/or float type; None keeps what there is."""
        pooled = self.pooled.to(device=device, dtype=dtype)
        return TextCond(self.tokens.to(device=device, dtype=dtype), pooled)

    def expand(self, n: int) -> "TextCond":
        """Repeats a batch of 1 to n without copying; a batch of n is returned as it is.

        Raises:
            ValueError: the batch is neither 1 nor n.
        """
        if len(self) == n:
            return self
        if len(self) != 1:
            raise ValueError(f"expand({n}) needs a batch of 1, got {len(self)}: use repeat_interleave")
        return TextCond(self.tokens.expand(n, -1, -1), self.pooled.expand(n, -1))

    def repeat_interleave(self, n: int) -> "TextCond":
        """Each row n times in a row: (B) -> (B n)."""
        return TextCond(self.tokens.repeat_interleave(n, dim=0), self.pooled.repeat_interleave(n, dim=0))

    def null_like(self) -> "TextCond":
        """Zeros of the same shape: the condition SD3 sees when all encoders are dropped."""
        return TextCond(torch.zeros_like(self.tokens), torch.zeros_like(self.pooled))

    @staticmethod
    def cat(conds: "Sequence[TextCond]") -> "TextCond":
        """Joins batches; all need the same L, D and P.

        Raises:
            ValueError: nothing to join, or the shapes differ.
        """
        shapes = {(tuple(c.tokens.shape[1:]), tuple(c.pooled.shape[1:])) for c in conds}
        if len(shapes) != 1:
            raise ValueError(f"cannot join conditions of different shapes: {sorted(shapes)}")
        return TextCond(torch.cat([c.tokens for c in conds]), torch.cat([c.pooled for c in conds]))


def null(like: TextCond) -> TextCond:
    """The all-dropped condition for `like`: zeros, which is not the empty prompt."""
    return like.null_like()


@dataclass(frozen=True, eq=False)
class EncoderOutputs:
    """What the three encoders give before they are put together; tokens (B, L, width), pooled (B, width)."""

    clip_l_tokens: Tensor
    clip_l_pooled: Tensor
    clip_g_tokens: Tensor
    clip_g_pooled: Tensor
    t5_tokens: Tensor

    def __getitem__(self, index: slice | Tensor) -> "EncoderOutputs":
        """Rows by slice or LongTensor."""
        return EncoderOutputs(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def cat(outputs: "Sequence[EncoderOutputs]") -> "EncoderOutputs":
        """Joins batches of the same shapes."""
        return EncoderOutputs(*(torch.cat([getattr(o, f.name) for o in outputs]) for f in fields(EncoderOutputs)))


ENCODERS = ("clip_l", "clip_g", "t5")


@dataclass(frozen=True)
class Layout:
    """Which part of a condition comes from which encoder.

    Attributes:
        clip_l, clip_g: widths of their tokens, which lie side by side in the first rows.
        clip_l_pooled: width of CLIP-L's pooled features; the others are CLIP-G's.
        t5_tokens: rows of T5, the last ones.
    """

    clip_l: int
    clip_g: int
    clip_l_pooled: int
    t5_tokens: int


def without(cond: TextCond, keep: Tensor, layout: Layout) -> TextCond:
    """What `drop` does, on conditions that are put together already: (B, 3) bool `keep` in the order of `ENCODERS`.

    Raises:
        ValueError: `keep` is not (B, 3) bool, or the layout is not that of the conditions.
    """
    batch, length, width = cond.tokens.shape
    if keep.dtype != torch.bool or keep.shape != (batch, 3):
        raise ValueError(f"keep must be bool {(batch, 3)}, got {keep.dtype} {tuple(keep.shape)}")
    if layout.t5_tokens > length or layout.clip_l + layout.clip_g > width or layout.clip_l_pooled > cond.pooled.shape[1]:
        raise ValueError(f"{layout} does not fit conditions {tuple(cond.tokens.shape)}, {tuple(cond.pooled.shape)}")
    keep = keep.to(cond.tokens.device)
    whose = torch.full((length, width), 3, device=keep.device)  # 3 is padding, zero already
    rows = length - layout.t5_tokens
    whose[:rows, : layout.clip_l], whose[:rows, layout.clip_l : layout.clip_l + layout.clip_g] = 0, 1
    whose[rows:] = 2
    of_pooled = (torch.arange(cond.pooled.shape[1], device=keep.device) >= layout.clip_l_pooled).long()
    kept = torch.cat([keep, keep.new_ones(batch, 1)], dim=1)
    tokens = torch.where(kept[:, whose], cond.tokens, torch.zeros_like(cond.tokens))
    return TextCond(tokens, torch.where(kept[:, of_pooled], cond.pooled, torch.zeros_like(cond.pooled)))


def cut(cond: TextCond, layout: Layout) -> TextCond:
    """Without T5's rows, which a network that never reads T5 need not be given: a shorter sequence, another function."""
    return TextCond(cond.tokens[:, : cond.tokens.shape[1] - layout.t5_tokens], cond.pooled)


def assemble(outputs: EncoderOutputs) -> TextCond:
    """SD3's layout: CLIP-L and CLIP-G joined along features, zero-padded to T5's width, then T5 along L.

    Raises:
        ValueError: the two CLIPs together are wider than T5.
    """
    clip = torch.cat([outputs.clip_l_tokens, outputs.clip_g_tokens], dim=-1)
    missing = outputs.t5_tokens.shape[-1] - clip.shape[-1]
    if missing < 0:
        raise ValueError(f"CLIP-L + CLIP-G are {clip.shape[-1]} wide, T5 only {outputs.t5_tokens.shape[-1]}")
    tokens = torch.cat([F.pad(clip, (0, missing)), outputs.t5_tokens], dim=1)
    return TextCond(tokens, torch.cat([outputs.clip_l_pooled, outputs.clip_g_pooled], dim=-1))


def drop(outputs: EncoderOutputs, keep: Tensor) -> EncoderOutputs:
    """Zeroes the outputs of dropped encoders, per sample: the way SD3 learns to do without them.

    Args:
        outputs: batch of B.
        keep: (B, 3) bool, in the order CLIP-L, CLIP-G, T5.

    Raises:
        ValueError: `keep` is not (B, 3) bool.
    """
    wanted = (len(outputs.t5_tokens), 3)
    if keep.dtype != torch.bool or keep.shape != wanted:
        raise ValueError(f"keep must be bool {wanted}, got {keep.dtype} {tuple(keep.shape)}")

    def masked(x: Tensor, encoder: int) -> Tensor:
        kept = keep[:, encoder].reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(kept, x, torch.zeros_like(x))  # not a product: 0 * inf would be nan

    return EncoderOutputs(
        clip_l_tokens=masked(outputs.clip_l_tokens, 0),
        clip_l_pooled=masked(outputs.clip_l_pooled, 0),
        clip_g_tokens=masked(outputs.clip_g_tokens, 1),
        clip_g_pooled=masked(outputs.clip_g_pooled, 1),
        t5_tokens=masked(outputs.t5_tokens, 2),
    )
