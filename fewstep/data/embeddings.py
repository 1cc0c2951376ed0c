"""Text conditions on disk: each prompt is encoded once, so that large text encoders need not stay in memory.

One prompt is one safetensors file, named by the hash of its text, that appears by a rename once it is whole. Conditions
always come from the files: a run that was killed and goes on meets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.data.trajectories import Encode
from fewstep.engine import ranks
from fewstep.engine.log import Progress

FEW = 64  # prompts below which no progress is shown


@dataclass(frozen=True)
class OnDisk:
    """Prompts to conditions, by files; itself an `Encode`.

    Attributes:
        opened: opens the text encoders; called only when a prompt is not there yet, and what it gives is then let go.
        folder: of one teacher and one number of tokens; made when the first condition is written.
        dtype: that conditions are stored in; they come back in float32.
        batch: prompts encoded at once, always as many: what else is in a batch can change the last bits.
    """

    opened: Callable[[], Encode]
    folder: Path
    dtype: torch.dtype = torch.float32
    batch: int = 16

    def __call__(self, texts: Sequence[str]) -> TextCond:
        """Conditions of prompts, in float32.

        Raises:
            ValueError: a file is damaged.
        """
        self._fill(texts)
        rows = [_load(path_of(self.folder, text)) for text in texts]
        return TextCond(torch.stack([r["tokens"] for r in rows]).float(), torch.stack([r["pooled"] for r in rows]).float())

    def prepare(self, texts: Iterable[str]) -> None:
        """Encode what is not there yet, with the encoders opened once; of several processes the first one does."""
        with ranks.first_alone() as first:
            if first:
                self._fill(texts)

    def _fill(self, texts: Iterable[str]) -> None:
        missing = [text for text in dict.fromkeys(texts) if not path_of(self.folder, text).exists()]
        if not missing:
            return
        encode = self.opened()
        progress = Progress("text conditions", len(missing), 0) if len(missing) > FEW else None
        for first in range(0, len(missing), self.batch):
            chunk = missing[first : first + self.batch]
            cond = encode([*chunk, *[""] * (self.batch - len(chunk))]).to(dtype=self.dtype)
            for text, tokens, pooled in zip(chunk, cond.tokens, cond.pooled, strict=False):
                _write(path_of(self.folder, text), tokens, pooled, text)
            if progress:
                progress.show(first + len(chunk))
        if progress:
            progress.close()


def conditions(encode: Encode, prompts: Sequence[str]) -> Callable[[Tensor], TextCond]:
    """Conditions of prompts by their numbers (B,): from memory, or as they are asked for where they lie on disk."""
    if isinstance(encode, OnDisk):
        return lambda rows: encode([prompts[k] for k in rows.tolist()])
    cond = encode(prompts)
    return lambda rows: cond[rows]


def path_of(folder: Path, text: str) -> Path:
    """Where the condition of a prompt lies."""
    name = hashlib.sha256(text.encode()).hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def _write(path: Path, tokens: Tensor, pooled: Tensor, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"tokens": tokens.contiguous(), "pooled": pooled.contiguous()}, partial, {"prompt": text})
    partial.replace(path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, it is made again") from error
