"""Text conditions on disk: each prompt is encoded once, so that large text encoders need not stay in memory.

They lie in WebDataset shards of a few dozen, each condition under the hash of its prompt. Conditions always come from the
files: a run that was killed and goes on meets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.data import shards
from fewstep.data.trajectories import Encode
from fewstep.engine import ranks
from fewstep.engine.log import Progress

FEW = 64  # prompts below which no progress is shown
SHARD = 64  # conditions in a shard: SD3.5's take 175 MiB; whole batches, so that a run that goes on has the same ones


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
    _known: dict[str, tuple[Path, Tensor]] = field(default_factory=dict, compare=False)
    _read: set[Path] = field(default_factory=set, compare=False)

    def __call__(self, texts: Sequence[str]) -> TextCond:
        """Conditions of prompts, in float32.

        Raises:
            ValueError: a file is damaged.
        """
        self._fill(texts)
        rows = [_loaded(*self._known[key_of(text)]) for text in texts]
        return TextCond(torch.stack([r["tokens"] for r in rows]).float(), torch.stack([r["pooled"] for r in rows]).float())

    def prepare(self, texts: Iterable[str]) -> None:
        """Encode what is not there yet, with the encoders opened once; of several processes the first one does."""
        with ranks.first_alone() as first:
            if first:
                self._fill(texts)

    def _fill(self, texts: Iterable[str]) -> None:
        missing = self._missing(texts)
        if missing:  # another process may have made them
            self._look()
            missing = self._missing(missing)
        if not missing:
            return
        encode = self.opened()
        progress = Progress("text conditions", len(missing), 0) if len(missing) > FEW else None
        for first in range(0, len(missing), SHARD):
            chunk = missing[first : first + SHARD]
            batches = [chunk[start : start + self.batch] for start in range(0, len(chunk), self.batch)]
            made = [sample for batch in batches for sample in self._encoded(encode, batch)]
            name = hashlib.sha256("".join(key for key, _ in made).encode()).hexdigest()[:16]
            shards.write(self.folder / f"{name}-{len(made):03d}.tar", made)
            if progress:
                progress.show(first + len(chunk))
        if progress:
            progress.close()
        self._look()

    def _missing(self, texts: Iterable[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if key_of(text) not in self._known]

    def _look(self) -> None:
        """Learn what lies in shards that have come since the last look."""
        for path in sorted(set(self.folder.glob("*.tar")) - self._read):
            found = shards.read(path)
            if len(found) != int(path.stem.rpartition("-")[2]):
                raise ValueError(f"{path} is damaged (cut off): delete it, it is made again")
            self._known.update((key, (path, parts["safetensors"])) for key, parts in found.items())
            self._read.add(path)

    def _encoded(self, encode: Encode, texts: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        cond = encode([*texts, *[""] * (self.batch - len(texts))]).to(dtype=self.dtype)
        for text, tokens, pooled in zip(texts, cond.tokens, cond.pooled, strict=False):
            packed = save({"tokens": tokens.contiguous(), "pooled": pooled.contiguous()})
            yield key_of(text), {"safetensors": packed, "txt": text.encode()}


def remembered(encode: Encode, device: torch.device) -> Encode:
    """An `Encode` that asks `encode` for each text once, and keeps and gives conditions on a device."""
    row_of: dict[str, int] = {}
    kept: list[TextCond] = []  # one, with a row for each text

    def call(texts: Sequence[str]) -> TextCond:
        missing = [text for text in dict.fromkeys(texts) if text not in row_of]
        if missing:
            made = encode(missing).to(device)
            kept[:] = [TextCond.cat([*kept, made])]
            row_of.update((text, len(row_of)) for text in missing)
        return kept[0][torch.tensor([row_of[text] for text in texts], device=device)]

    return call


def conditions(encode: Encode, prompts: Sequence[str]) -> Callable[[Tensor], TextCond]:
    """Conditions of prompts by their numbers (B,): from memory, or as they are asked for where they lie on disk."""
    if isinstance(encode, OnDisk):
        return lambda rows: encode([prompts[k] for k in rows.tolist()])
    cond = encode(prompts)
    return lambda rows: cond[rows]


def key_of(text: str) -> str:
    """Under which key the condition of a prompt lies."""
    return hashlib.sha256(text.encode()).hexdigest()


def _loaded(path: Path, part: Tensor) -> dict[str, Tensor]:
    try:
        return load(shards.raw(part))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, it is made again") from error
