"""Text conditions on disk: each prompt is encoded once, so that large text encoders need not stay in memory.

One prompt is one safetensors file, named by the hash of its text, that appears by a rename once it is whole. Conditions
always come from the files: a run that was killed and goes on meets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewstep.conditioning import TextCond
from fewstep.data.trajectories import Encode
from fewstep.engine.log import Progress

FEW = 64  # prompts below which no progress is shown


def path_of(folder: Path, text: str) -> Path:
    """Where the condition of a prompt lies."""
    name = hashlib.sha256(text.encode()).hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def cached(opened: Callable[[], Encode], folder: Path, dtype: torch.dtype = torch.float32, batch: int = 16) -> Encode:
    """Prompts to conditions, with a memory on disk.

    Args:
        opened: opens the text encoders; called only when a prompt is not there yet, and what it gives is then let go.
        folder: of one teacher and one number of tokens; made when the first condition is written.
        dtype: that conditions are stored in; they come back in float32.
        batch: prompts encoded at once.
    """

    def read(texts: Sequence[str]) -> TextCond:
        missing = [text for text in dict.fromkeys(texts) if not path_of(folder, text).exists()]
        progress = Progress("text conditions", len(missing), 0) if len(missing) > FEW else None
        encode = opened() if missing else None
        for first in range(0, len(missing), batch):
            chunk = missing[first : first + batch]
            assert encode is not None
            cond = encode(chunk).to(dtype=dtype)
            for text, tokens, pooled in zip(chunk, cond.tokens, cond.pooled, strict=True):
                write(path_of(folder, text), tokens, pooled, text)
            if progress:
                progress.show(first + len(chunk))
        if progress:
            progress.close()
        rows = [_load(path_of(folder, text)) for text in texts]
        return TextCond(torch.stack([r["tokens"] for r in rows]).float(), torch.stack([r["pooled"] for r in rows]).float())

    return read


def write(path: Path, tokens: torch.Tensor, pooled: torch.Tensor, text: str) -> None:
    """One condition, (L, D) and (P,), and its prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"tokens": tokens.contiguous(), "pooled": pooled.contiguous()}, partial, {"prompt": text})
    partial.replace(path)


def size(tokens: int, width: int, pooled: int, dtype: torch.dtype) -> int:
    """Bytes of one stored condition."""
    return (tokens * width + pooled) * dtype.itemsize


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, it is made again") from error
