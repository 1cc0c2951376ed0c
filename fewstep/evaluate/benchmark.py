"""A protocol as a file: what is asked of a model, how often, and what reads the answers, under one hash.

Two scores may be compared only if they answer the same benchmark. How an arm was sampled (grid, guidance) belongs to the arm;
`asked_and_sampled` hashes both, and no score is printed without that hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.engine import files

FORMAT = 1
MAX_SEEDS = 1000  # image number = 1000 prompt number + seed number


@dataclass(frozen=True)
class Entry:
    """One prompt.

    Attributes:
        text: as a model reads it.
        category: what it is reported under, such as GenEval's task.
        facts: what a scorer needs to know of it, as JSON.
    """

    text: str
    category: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """What is asked.

    Attributes:
        name: such as "shapes-strict" or "geneval".
        entries: prompts in a fixed order; the position of a prompt addresses its noise.
        seeds: images of each prompt, 1 to 1000.
        evaluator: what reads the images, with versions, such as {"detector": "3"}.
        noise_seed: of all initial noise; image i has the address 1000 prompt + seed.
        resolution: pixels of an image's side; 0 is each model's own.
        preprocessing: what is done to images before they are read, by name.
        version: of the benchmark's own rules.

    Raises:
        ValueError: no prompts, an empty one, a number of seeds out of range, or a field of another type than it should be.
    """

    name: str
    entries: tuple[Entry, ...]
    seeds: int
    evaluator: Mapping[str, str]
    noise_seed: int = 7777
    resolution: int = 0
    preprocessing: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        if not self.entries:
            raise ValueError(f"benchmark {self.name}: no prompts")
        empty = next((i for i, entry in enumerate(self.entries) if not entry.text.strip()), None)
        if empty is not None:
            raise ValueError(f"benchmark {self.name}: prompt {empty} is empty")
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise ValueError(f"benchmark {self.name}: seeds must be 1 to {MAX_SEEDS}, not {self.seeds}")

    def _check_types(self) -> None:
        texts = {key: getattr(self, key) for key in ("name", "preprocessing")}
        numbers = {key: getattr(self, key) for key in ("seeds", "noise_seed", "resolution", "version")}
        wrong = next((key for key, value in texts.items() if not isinstance(value, str)), None)
        if wrong is not None or not self.name.strip():
            raise ValueError(f"a benchmark's {wrong or 'name'} must be text, not {texts[wrong or 'name']!r}")
        wrong = next((key for key, value in numbers.items() if type(value) is not int or value < 0), None)
        if wrong is not None:
            raise ValueError(f"benchmark {self.name}: {wrong} must be a whole number from 0 on, not {numbers[wrong]!r}")
        told = self.evaluator
        if not isinstance(told, Mapping) or not all(isinstance(x, str) for pair in told.items() for x in pair):
            raise ValueError(f"benchmark {self.name}: evaluator must name texts, such as {{'detector': '3'}}, not {told!r}")
        for number, entry in enumerate(self.entries):
            if not isinstance(entry.text, str) or not isinstance(entry.category, str):
                raise ValueError(f"benchmark {self.name}: text and category of prompt {number} must be text")
            if not isinstance(entry.facts, Mapping):
                raise ValueError(f"benchmark {self.name}: facts of prompt {number} must be an object, not {entry.facts!r}")

    @cached_property
    def hash(self) -> str:
        """sha256, in hexadecimal, of every field as canonical JSON."""
        return digest(asdict(self))

    @property
    def images(self) -> list[tuple[int, int]]:
        """(prompt number, seed number) of every image, prompts in order and all seeds of one together."""
        return every_image(len(self.entries), self.seeds)

    @property
    def categories(self) -> list[str]:
        """The category of every prompt, in order."""
        return [entry.category for entry in self.entries]

    def summary(self) -> dict[str, Any]:
        """The benchmark without its prompts, as tables show it."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        counts = {c: self.categories.count(c) for c in dict.fromkeys(self.categories)}
        return {"hash": self.hash, **found, "evaluator": dict(self.evaluator), "entries": counts}


def every_image(prompts: int, seeds: int) -> list[tuple[int, int]]:
    """(prompt number, seed number) of every image, prompts in order and all seeds of one together."""
    return [(p, s) for p in range(prompts) for s in range(seeds)]


def noise_index(prompt: int, seed: int) -> int:
    """Address of an image's initial noise: the same for every arm."""
    return MAX_SEEDS * prompt + seed


def digest(record: Any) -> str:
    """sha256, in hexadecimal, of canonical JSON."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def asked_and_sampled(benchmark: Benchmark, sampling: Mapping[str, Any]) -> str:
    """Hash of a score's whole protocol: the benchmark, and the grid, guidance and size that its images were drawn with."""
    told = {key: sampling.get(key) for key in ("grid", "guidance_scale", "width", "height")}
    return digest({"benchmark": benchmark.hash, "sampling": told})


def write(path: Path, benchmark: Benchmark) -> None:
    """Store a benchmark with its hash, whole or not at all."""
    files.write(path, json.dumps({"format": FORMAT, "hash": benchmark.hash, **asdict(benchmark)}, indent=1))


def read(path: Path) -> Benchmark:
    """A benchmark from its file.

    Raises:
        ValueError: missing, damaged, of another format, or changed since its hash was written.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError(f"it is not a protocol of format {FORMAT}")
        told = record.pop("hash", None)
        entries = tuple(Entry(**entry) for entry in record.pop("entries"))
        made = Benchmark(entries=entries, **record)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a protocol's file or name") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no protocol: {error}") from error
    if told is not None and told != made.hash:
        raise ValueError(f"{path} was changed after its hash was written: delete its hash, and it is a protocol of its own")
    return made
