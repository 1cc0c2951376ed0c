"""Prompts by number, from the bundled world or from a list; and those that a run is watched with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from fewstep.worlds.shapes.grammar import GENEVAL_TASKS
from fewstep.worlds.shapes.prompts import Split, caption, protocol_prompts, training_ask

HELD_OUT_EVERY = 10  # prompts of a list
CAPTIONS = 2**16  # of the shapes world, each in tens of microseconds


def source(own: Sequence[str] | None, seed: int) -> Callable[[int], str]:
    """Prompts to train on: prompt k depends on (seed, k) alone.

    Args:
        own: prompts of one's own, without repetitions; every pass over them is shuffled anew, and every tenth is held out
            (see `held_out`). None: training captions of the shapes world, never a held-out combination; `CAPTIONS` of
            them, then the same ones again.
        seed: of the order, or of the captions.
    """
    if own is None:
        again = cache(lambda k: _shapes(np.random.default_rng([seed, k])))
        return lambda k: again(k % CAPTIONS)
    trained = [text for i, text in enumerate(own, start=1) if i % HELD_OUT_EVERY]

    def at(k: int) -> str:
        order = np.random.default_rng([seed, k // len(trained)]).permutation(len(trained))
        return trained[order[k % len(trained)]]

    return at


def held_out(own: Sequence[str] | None, count: int) -> list[str]:
    """At most `count` prompts that a run is watched with, and that something may be chosen by.

    Selection prompts of the shapes world, tasks in turn (never those of the report; training meets the same requests with
    other noise); or every twentieth of one's own, which training never sees. A list of fewer than ten holds out nothing,
    and its own prompts are given.
    """
    if own is None:
        return _in_turn("select", count)
    return list(own[HELD_OUT_EVERY - 1 :: 2 * HELD_OUT_EVERY] or own)[:count]


def reported(own: Sequence[str] | None, count: int) -> list[str]:
    """At most `count` prompts for pictures in a report: nothing was trained on them or chosen by them.

    Report prompts of the shapes world, tasks in turn; or the other half of the held-out ones of a list. A list of fewer than
    twenty has none, and gives those that it is watched with.
    """
    if own is None:
        return _in_turn("report", count)
    return list(own[2 * HELD_OUT_EVERY - 1 :: 2 * HELD_OUT_EVERY])[:count] or held_out(own, count)


def _in_turn(split: Split, count: int) -> list[str]:
    tasks = [protocol_prompts(split, count, (task,)) for task in GENEVAL_TASKS]
    return [of_task[k].text for k in range(count) for of_task in tasks if k < len(of_task)][:count]


def _shapes(rng: np.random.Generator) -> str:
    return caption(training_ask(rng), rng)
