"""Prompts by number: of the bundled world, or lines of a text file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fewstep.worlds.shapes.prompts import caption, training_ask


def shapes_prompts(seed: int) -> Callable[[int], str]:
    """Training captions of the shapes world: prompt k depends on (seed, k) alone. Never a held-out combination."""

    def at(k: int) -> str:
        rng = np.random.default_rng([seed, k])
        return caption(training_ask(rng), rng)

    return at


def file_prompts(path: Path, seed: int) -> Callable[[int], str]:
    """Prompts from a UTF-8 text file, one a line, empty lines ignored; each pass over the file is shuffled anew.

    Raises:
        ValueError: when the file is missing or has no prompt.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; `prompts` takes a text file with one prompt a line, or \"shapes\"")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")

    def at(k: int) -> str:
        order = np.random.default_rng([seed, k // len(lines)]).permutation(len(lines))
        return lines[order[k % len(lines)]]

    return at


def source(name: str, seed: int) -> Callable[[int], str]:
    """`"shapes"` or the path of a text file."""
    return shapes_prompts(seed) if name == "shapes" else file_prompts(Path(name), seed)
