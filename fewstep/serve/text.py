"""Prompts to conditions, so that a prompt means the same in any batch; kept in memory and, if asked, on disk.

On disk a condition lies under the hash of the text encoders' artefact, the number of T5's tokens, the type and the prompt. A
file that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewstep.conditioning import TextCond
from fewstep.models import sd3

IN_MEMORY, ON_DISK = 2**28, 2**32  # bytes
BATCH = 16  # prompts that are encoded at once
Kept = TypeVar("Kept")
Encode = Callable[[Sequence[str]], list[TextCond]]


class Recent(Generic[Kept]):
    """What was used last, up to a number of bytes."""

    def __init__(self, most: int, size: Callable[[Kept], int]) -> None:
        self._most, self._size, self._bytes = most, size, 0
        self._held: OrderedDict[Any, Kept] = OrderedDict()

    def get(self, key: Any) -> Kept | None:
        """What lies there, which is then the newest."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Any, value: Kept) -> None:
        """Keep it; the oldest make room, never the newest itself."""
        self._bytes += self._size(value) - (self._size(self._held[key]) if key in self._held else 0)
        self._held[key] = value
        self._held.move_to_end(key)
        while self._bytes > self._most and len(self._held) > 1:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= self._size(oldest)

    def __len__(self) -> int:
        return len(self._held)


def weight(cond: TextCond) -> int:
    """Bytes of a condition."""
    return cond.tokens.nbytes + cond.pooled.nbytes


class Conditions:
    """Conditions of prompts, each a batch of 1 in float32 on the CPU.

    Args:
        encode: encodes prompts that are new; called once with all of them.
        identity: what the conditions depend on besides the prompt.
        folder: where they are kept; None keeps them in memory alone.
        on_disk: bytes that may lie there when the model is opened; the oldest beyond them are deleted.
    """

    def __init__(self, encode: Encode, identity: Sequence[Any], folder: Path | None, on_disk: int = ON_DISK) -> None:
        self._encode, self._identity, self._folder = encode, list(identity), folder
        self._recent: Recent[TextCond] = Recent(IN_MEMORY, weight)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _prune(folder, on_disk)

    def __call__(self, texts: Sequence[str]) -> dict[str, TextCond]:
        """Conditions by prompt."""
        found = {text: cond for text in dict.fromkeys(texts) if (cond := self.known(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for text, cond in zip(missing, self._encode(missing) if missing else [], strict=True):
            found[text] = TextCond(cond.tokens.float().cpu(), cond.pooled.float().cpu())
            self._recent.put(text, found[text])
            self._write(text, found[text])
        return found

    def known(self, text: str) -> TextCond | None:
        """A prompt's condition, if it need not be encoded."""
        cond = self._recent.get(text)
        if cond is None and (cond := self._read(text)) is not None:
            self._recent.put(text, cond)
        return cond

    def _path(self, text: str) -> Path | None:
        if self._folder is None:
            return None
        told = json.dumps([*self._identity, text], ensure_ascii=True)
        return self._folder / f"{hashlib.sha256(told.encode()).hexdigest()}.safetensors"

    def _read(self, text: str) -> TextCond | None:
        path = self._path(text)
        if path is None or not path.is_file():
            return None
        try:
            held = load_file(path)
            cond = TextCond(held["tokens"], held["pooled"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        whole = len(cond) == 1 and cond.tokens.dtype == cond.pooled.dtype == torch.float32
        return cond if whole and bool(cond.tokens.isfinite().all() & cond.pooled.isfinite().all()) else None

    def _write(self, text: str, cond: TextCond) -> None:
        path = self._path(text)
        if path is None:
            return
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_file({"tokens": cond.tokens.contiguous(), "pooled": cond.pooled.contiguous()}, partial)
        os.replace(partial, path)


def together(encode: Callable[[list[str]], TextCond], alone: bool = False) -> Encode:
    """An encoder of batches, so used that a prompt's condition is the same in any, bit for bit on a CPU.

    Args:
        encode: prompts to conditions.
        alone: it may be given one prompt. By default never: products of one prompt's few rows are computed in another way.
    """

    def run(texts: Sequence[str]) -> list[TextCond]:
        made = []
        for first in range(0, len(texts), BATCH):
            some = list(texts[first : first + BATCH])
            cond = encode(some if alone or len(some) > 1 else [*some, ""])
            made += [cond[k] for k in range(len(some))]
        return made

    return run


def in_turn(folder: Path, t5_tokens: int, dtype: torch.dtype, encoders: Sequence[str]) -> Encode:
    """Encode with one text encoder in memory at a time, on the CPU, and none afterwards.

    Args:
        folder: a pipeline folder.
        t5_tokens: tokens of T5.
        dtype: of the encoders' weights in memory.
        encoders: that are read, as `conditioning.ENCODERS` names them.
    """
    parts = [part for part in sd3.ENCODERS if part not in sd3.unread(encoders)]

    def encode(texts: Sequence[str]) -> list[TextCond]:
        found = sd3.encode_in_turn(folder, texts, t5_tokens, dtype, parts, at_once=1)  # alone: the same in any batch
        return [found[k] for k in range(len(texts))]

    return encode


def cut(tokenizers: dict[str, Any], t5_tokens: int, text: str) -> bool:
    """Whether every text encoder cuts a prompt short."""
    limits = {name: t5_tokens if name == "tokenizer_3" else tok.model_max_length for name, tok in tokenizers.items()}
    return bool(limits) and all(len(tokenizers[name](text).input_ids) > most for name, most in limits.items())


def _prune(folder: Path, most: int) -> None:
    """Delete the oldest conditions beyond a number of bytes."""
    held = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in folder.glob("*.safetensors")), reverse=True)
    total = 0
    for _, size, path in held:
        total += size
        if total > most:
            path.unlink(missing_ok=True)
