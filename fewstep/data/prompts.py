"""Prompts by number: of the bundled world, or lines of a text file; and those that a run is watched with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fewstep.worlds.shapes.grammar import GENEVAL_TASKS
from fewstep.worlds.shapes.prompts import caption, protocol_prompts, training_ask

HELD_OUT_EVERY = 10  # lines of a text file


def shapes_prompts(seed: int) -> Callable[[int], str]:
    """Training captions of the shapes world: prompt k depends on (seed, k) alone. Never a held-out combination."""

    def at(k: int) -> str:
        rng = np.random.default_rng([seed, k])
        return caption(training_ask(rng), rng)

    return at


def file_prompts(path: Path, seed: int) -> Callable[[int], str]:
    """Prompts from a UTF-8 text file, one a line, empty and repeated lines ignored; each pass over the file is shuffled anew.

    Every tenth line is held out (see `held_out`).

    Raises:
        ValueError: when the file is missing or has no prompt.
    """
    everything = _lines(path)
    lines = [line for i, line in enumerate(everything, start=1) if i % HELD_OUT_EVERY]

    def at(k: int) -> str:
        order = np.random.default_rng([seed, k // len(lines)]).permutation(len(lines))
        return lines[order[k % len(lines)]]

    return at


def held_out(name: str, count: int) -> list[str]:
    """At most `count` prompts that a run is watched with.

    Selection prompts of the shapes world, tasks in turn (never those of the report; training meets the same requests with
    other noise); or every tenth line of a text file, which training never sees. A file of fewer than ten lines holds out
    nothing, and its own lines are given.

    Raises:
        ValueError: as in `file_prompts`.
    """
    if name == "shapes":
        tasks = [protocol_prompts("select", count, (task,)) for task in GENEVAL_TASKS]
        in_turn = [of_task[k].text for k in range(count) for of_task in tasks if k < len(of_task)]
        return in_turn[:count]
    lines = _lines(Path(name))
    return (lines[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or lines)[:count]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; `prompts` takes a text file with one prompt a line, or \"shapes\"")
    text = path.read_text(encoding="utf-8")
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))  # twice would not be held out
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines


def source(name: str, seed: int) -> Callable[[int], str]:
    """`"shapes"` or the path of a text file."""
    return shapes_prompts(seed) if name == "shapes" else file_prompts(Path(name), seed)
