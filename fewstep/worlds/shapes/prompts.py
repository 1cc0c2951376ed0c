"""Which requests are trained on, which select, which report; and scenes drawn for a request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fewstep.worlds.shapes.grammar import TASKS, Ask, Task, asks, wordings
from fewstep.worlds.shapes.scene import COLORS, RELATIONS, SHAPES, SIZES, Scene, Wanted, place

Split = Literal["select", "report"]

# Colour-shape combinations that no training scene contains: one colour per shape (ours).
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {("circle", "purple"), ("square", "cyan"), ("triangle", "orange"), ("cross", "pink")}
)

# What a training scene is made for. Scenes beyond the tasks (counts with colours, three things) widen the captions.
TRAINING_MIX: dict[str, float] = {
    "single_object": 0.04,
    "colors": 0.12,
    "sized": 0.06,
    "two_object": 0.12,
    "counting": 0.20,
    "position": 0.16,
    "color_attr": 0.16,
    "role_swap": 0.08,
    "relative_size": 0.06,
}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a protocol: its text, what it asks for, and the task that it belongs to."""

    text: str
    ask: Ask
    task: Task


def is_held_out(ask: Ask) -> bool:
    """Whether the request names a colour-shape combination that no training scene shows."""
    return any((w.shape, w.color) in HELD_OUT for w in ask.things)


def split_of(ask: Ask) -> Split:
    """The side a request is on, in all its wordings, by a hash: selection and report share no request.

    The salt is the first that leaves every small task requests on both sides (single objects have four in all).
    """
    return "select" if hashlib.sha256(f"7:{wordings(ask)[0]}".encode()).digest()[0] % 3 == 0 else "report"


def protocol_prompts(split: Split, per_task: int, tasks: tuple[Task, ...], held_out: bool = False) -> list[Prompt]:
    """A fixed list of at most `per_task` prompts for each task.

    Prompts come in the order of a hash of their text, so a longer list begins with the shorter one.

    Args:
        split: "select" (choices are made on these) or "report" (never used for a choice).
        per_task: how many prompts of each task; a small task gives all it has.
        tasks: which tasks.
        held_out: only requests with a combination never seen in training, instead of only seen ones.

    Raises:
        ValueError: if `per_task` is below 1.
    """
    if per_task < 1:
        raise ValueError(f"per_task must be at least 1, not {per_task}")
    chosen: list[Prompt] = []
    for task in tasks:
        asked = [ask for ask in asks(task) if is_held_out(ask) == held_out and split_of(ask) == split]
        texts = {t: ask for ask in asked for t in wordings(ask)}
        ordered = sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest())
        chosen += [Prompt(t, texts[t], task) for t in ordered[:per_task]]
    return chosen


def training_ask(rng: np.random.Generator) -> Ask:
    """Draw what a training caption says; never a held-out combination."""
    kinds = list(TRAINING_MIX)
    kind = kinds[rng.choice(len(kinds), p=list(TRAINING_MIX.values()))]
    while True:
        ask = _sized(rng) if kind == "sized" else _drawn(kind, rng)
        if not is_held_out(ask):
            return ask


def training_scene(ask: Ask, rng: np.random.Generator) -> Scene:
    """Draw a scene in which the request is exactly true and no held-out combination appears."""
    while True:
        scene = place_ask(ask, rng)
        if not any((o.shape, o.color) in HELD_OUT for o in scene.objects):
            return scene


def place_ask(ask: Ask, rng: np.random.Generator) -> Scene:
    """Draw a scene in which the request is exactly true, open attributes free."""
    if ask.relation == "larger than":
        sized = [Wanted(w.shape, w.color, s) for w, s in zip(ask.things, ("large", "small"), strict=True)]  # type: ignore[arg-type]
        return place(sized, rng)
    return place(ask.objects, rng, ask.relation)


def _sized(rng: np.random.Generator) -> Ask:
    color = COLORS[rng.integers(len(COLORS))] if rng.random() < 0.5 else None
    return Ask((Wanted(SHAPES[rng.integers(4)], color, SIZES[rng.integers(2)]),), (1,))


def _drawn(kind: str, rng: np.random.Generator) -> Ask:
    """One request of a task, drawn by its parts (listing the large tasks for every draw would be slow)."""
    first, second = (SHAPES[i] for i in rng.choice(4, size=2, replace=False))
    color_a, color_b = (COLORS[i] for i in rng.choice(8, size=2, replace=False))
    relation = RELATIONS[rng.integers(4)]
    if kind == "single_object":
        return Ask((Wanted(first),), (1,))
    if kind == "colors":
        return Ask((Wanted(first, color_a),), (1,))
    if kind == "counting":
        color = color_a if rng.random() < 0.3 else None
        return Ask((Wanted(first, color),), (int(rng.integers(2, 5)),))
    if kind == "two_object":
        return Ask((Wanted(first), Wanted(second)), (1, 1))
    if kind == "position":
        return Ask((Wanted(first), Wanted(second)), (1, 1), relation)
    if kind == "color_attr":
        return Ask((Wanted(first, color_a), Wanted(second, color_b)), (1, 1))
    if kind == "role_swap":
        return Ask((Wanted(first, color_a), Wanted(second, color_b)), (1, 1), relation)
    if kind == "relative_size":
        return Ask((Wanted(first), Wanted(second)), (1, 1), "larger than")
    raise ValueError(f"unknown kind {kind!r}; one of {', '.join(TASKS)}, sized")


def caption(ask: Ask, rng: np.random.Generator) -> str:
    """One wording of the request, drawn uniformly."""
    texts = wordings(ask)
    return texts[rng.integers(len(texts))]
