"""Captions of the shapes world: what a prompt asks for (`Ask`), its wordings, and the way back by parsing.

One closed vocabulary and a few wordings for each fact. `wordings` and `parse` are exact inverses (tested).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

from fewstep.worlds.shapes.scene import COLORS, RELATIONS, SHAPES, SIZES, Relation, Shape, Wanted

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr", "relative_size", "role_swap"]
TASKS: tuple[Task, ...] = get_args(Task)
GENEVAL_TASKS = TASKS[:6]  # same names and meaning as in GenEval; the overall score is their mean
EXTRA_TASKS = TASKS[6:]  # reported beside, never inside, the overall score

NUMBERS = {2: "two", 3: "three", 4: "four"}
PREFIXES = ("", "a picture of ", "an image of ", "a drawing of ", "a scene with ")
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
MAX_WORDS = 10  # the encoders read 12 tokens: these words, one start and one end mark
PLURAL: dict[Shape, str] = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


@dataclass(frozen=True)
class Ask:
    """What a prompt asks for.

    Attributes:
        things: one entry per kind of object; an attribute that is None is left open.
        counts: how many of each, aligned with `things`.
        relation: if given, the first thing stands so to the second ("larger than" compares sizes).
    """

    things: tuple[Wanted, ...]
    counts: tuple[int, ...]
    relation: Relation | Literal["larger than"] | None = None

    @property
    def objects(self) -> list[Wanted]:
        """One entry per object of the scene, things in order."""
        return [w for w, n in zip(self.things, self.counts, strict=True) for _ in range(n)]


def noun(thing: Wanted, count: int) -> str:
    """`a small red circle`, `three blue squares`."""
    if thing.shape is None:
        raise ValueError("a caption names the shape of everything it mentions")
    adjectives = [a for a in (thing.size, thing.color) if a is not None]
    if count > 1:
        return " ".join([NUMBERS[count], *adjectives, PLURAL[thing.shape]])
    words = [*adjectives, thing.shape]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def wordings(ask: Ask) -> list[str]:
    """All wordings of one request, each at most `MAX_WORDS` words, shortest prefix first."""
    nouns = [noun(w, n) for w, n in zip(ask.things, ask.counts, strict=True)]
    if ask.relation is None:
        cores = [" and ".join(nouns)]
    elif ask.relation == "larger than":
        cores = [f"{nouns[0]} larger than {nouns[1]}"]
    else:
        cores = [f"{nouns[0]} {words} {nouns[1]}" for words in RELATION_WORDS[ask.relation]]
    texts = [prefix + core for core in cores for prefix in PREFIXES]
    return [t for t in texts if len(t.split()) <= MAX_WORDS]


def parse(text: str) -> Ask:
    """Read a caption back.

    Raises:
        ValueError: naming the first word that does not fit the grammar.
    """
    core = text
    for prefix in PREFIXES[1:]:
        core = core.removeprefix(prefix)
    relation: Relation | Literal["larger than"] | None = None
    parts = core.split(" and ")
    markers = [(words, r) for r, forms in RELATION_WORDS.items() for words in sorted(forms, key=len, reverse=True)]
    for words, name in [*markers, ("larger than", "larger than")]:
        if f" {words} " in core:
            parts, relation = core.split(f" {words} "), name  # type: ignore[assignment]
            break
    if relation is not None and len(parts) != 2:
        raise ValueError(f"{text!r}: {relation!r} needs exactly one thing on each side")
    things, counts = zip(*(_parse_noun(part, text) for part in parts), strict=True)
    return Ask(things, counts, relation)


def _parse_noun(part: str, text: str) -> tuple[Wanted, int]:
    words = part.split()
    if not words:
        raise ValueError(f"{text!r}: an object is missing")
    articles = {"a": 1, "an": 1} | {word: n for n, word in NUMBERS.items()}
    if words[0] not in articles:
        raise ValueError(f"{text!r}: expected one of {', '.join(articles)} where {words[0]!r} stands")
    count = articles[words.pop(0)]
    size = next((s for s in SIZES if words and words[0] == s), None)
    words = words[1:] if size else words
    color = next((c for c in COLORS if words and words[0] == c), None)
    words = words[1:] if color else words
    shape = next((s for s in SHAPES if words == [PLURAL[s] if count > 1 else s]), None)
    if shape is None:
        raise ValueError(f"{text!r}: expected a shape ({', '.join(SHAPES)}) where {' '.join(words)!r} stands")
    return Wanted(shape, color, size), count


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted; the tokenizers are built from it."""
    words = {"a", "an", "and", "larger", "than", *COLORS, *SIZES, *SHAPES, *PLURAL.values(), *NUMBERS.values()}
    words |= set(" ".join(PREFIXES).split())
    words |= set(" ".join(itertools.chain(*RELATION_WORDS.values())).split())
    return sorted(words)


def asks(task: Task) -> list[Ask]:
    """Every request of a task, in a fixed order. Held-out combinations are included; see `prompts.is_held_out`."""
    one, pairs = [Wanted(s) for s in SHAPES], list(itertools.permutations(SHAPES, 2))
    colored = [Wanted(s, c) for s in SHAPES for c in COLORS]
    two_colored = [
        (a, b) for a, b in itertools.permutations(colored, 2) if a.shape != b.shape and a.color != b.color
    ]
    if task == "single_object":
        return [Ask((w,), (1,)) for w in one]
    if task == "two_object":
        return [Ask((Wanted(a), Wanted(b)), (1, 1)) for a, b in pairs]
    if task == "counting":
        return [Ask((w,), (n,)) for w in one for n in NUMBERS]
    if task == "colors":
        return [Ask((w,), (1,)) for w in colored]
    if task == "position":
        return [Ask((Wanted(a), Wanted(b)), (1, 1), r) for a, b in pairs for r in RELATIONS]
    if task == "color_attr":
        return [Ask(pair, (1, 1)) for pair in two_colored]
    if task == "relative_size":
        return [Ask((Wanted(a), Wanted(b)), (1, 1), "larger than") for a, b in pairs]
    if task == "role_swap":
        return [Ask(pair, (1, 1), r) for pair in two_colored for r in RELATIONS]
    raise ValueError(f"unknown task {task!r}; one of {', '.join(TASKS)}")
