"""Does an image show what its prompt asked for? Two scorings, and the words and facts that reports need.

strict: exactly the objects asked for, nothing else, nothing unexplained.
geneval: at least the objects asked for (exactly, where a number is asked for); unexplained marks are ignored.
In both, things are assigned to objects so that each object is used once; any assignment that works counts.
GenEval looks at its most confident objects first instead, which without learned confidences would be chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fewstep.worlds.shapes.detect import Detection, Found
from fewstep.worlds.shapes.grammar import NUMBERS, PLURAL, Ask
from fewstep.worlds.shapes.scene import CANVAS, COLORS, SHAPES, SIZES, Color, Shape, Size, Wanted

CLEARLY_LARGER = 1.2  # ratio of radii; the two size bands are at least 1.49 apart
DEAD_ZONE = 0.1  # GenEval: share of both boxes' sizes by which centres must differ before they count as apart

# Half width, and top and bottom (v, down) of each shape's box at nominal radius 1, from `render.inside`.
BOX: dict[Shape, tuple[float, float, float]] = {
    "circle": (1.0, -1.0, 1.0),
    "square": (0.86, -0.86, 0.86),
    "triangle": (0.56 * 1.9, -1.0, 0.9),
    "cross": (1.0, -1.0, 1.0),
}


@dataclass(frozen=True)
class Score:
    """Both verdicts on one image. `reason` says why `strict` is false, and is empty where it is true."""

    strict: bool
    geneval: bool
    unknown: int
    reason: str


class Fact(NamedTuple):
    """What one object shows, as a value to count; `cell` is 0 to 8, row by row, on thirds of the canvas."""

    shape: Shape
    color: Color
    size: Size
    cell: int


def score(detection: Detection, ask: Ask) -> Score:
    """Judge one image.

    Args:
        detection: what the image shows.
        ask: what its prompt asked for.

    Returns:
        The two verdicts, the number of unexplained marks, and the reason of a strict failure.
    """
    reason = _strict_fault(detection, ask)
    return Score(not reason, _geneval(detection, ask), detection.unknown, reason)


def accepts(thing: Wanted, found: Found) -> bool:
    """Whether an object is what is wanted; attributes that are None are open."""
    pairs = ((thing.shape, found.shape), (thing.color, found.color), (thing.size, found.size))
    return all(asked in (None, shown) for asked, shown in pairs)


def strict_relation(a: Found, relation: str, b: Found) -> bool:
    """Whether `a` is `relation` `b`: its centre lies that way, farther along that axis than across it.

    "larger than" holds from `CLEARLY_LARGER` times the radius on.
    """
    if relation == "larger than":
        return a.radius >= CLEARLY_LARGER * b.radius
    dx, dy = a.x - b.x, a.y - b.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along > min(abs(dx), abs(dy))


def geneval_relation(a: Found, relation: str, b: Found) -> bool:
    """GenEval's rule: offset of box centres less a dead zone, over its length, beyond 0.5 on the axis.

    "larger than", which GenEval does not have, holds for any greater radius.
    """
    if relation == "larger than":
        return a.radius > b.radius
    (ax, ay, aw, ah), (bx, by, bw, bh) = _box(a), _box(b)
    offset = np.array([ax - bx, ay - by])
    zone = DEAD_ZONE * np.array([aw + bw, ah + bh])
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - zone, 0.0)
    length = float(np.linalg.norm(offset))
    if length == 0.0:
        return False
    dx, dy = beyond / length
    return bool({"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation] > 0.5)


def describe(detection: Detection) -> str:
    """What an image shows, in words: `one large red circle, two small blue squares, 1 unknown`."""
    phrases = [_phrase(w, n) for w, n in _tally(detection)]
    if detection.unknown:
        phrases.append(f"{detection.unknown} unknown")
    return ", ".join(phrases) or "nothing"


def facts(detection: Detection) -> tuple[Fact, ...]:
    """One record per object, sorted, for histograms and entropies; unexplained marks have none."""
    return tuple(sorted(Fact(o.shape, o.color, o.size, _cell(o)) for o in detection.objects))


def ask_from(detection: Detection) -> Ask:
    """The request that says all that an image shows, except where things stand: the way from image to prompt.

    Raises:
        ValueError: if there is nothing to say, or something is unexplained.
    """
    if detection.unknown or not detection.objects:
        raise ValueError(f"no request describes {describe(detection)!r}")
    things, counts = zip(*_tally(detection), strict=True)
    return Ask(things, counts)


def _strict_fault(detection: Detection, ask: Ask) -> str:
    if detection.unknown:
        return f"{detection.unknown} unknown"
    wanted = len(ask.objects)
    if len(detection.objects) != wanted:
        return f"{len(detection.objects)} objects, not {wanted}"
    matched = False
    for chosen in _assignments(detection.objects, ask.objects):
        matched = True
        if _related(chosen, ask, strict=True):
            return ""
    if matched:
        return f"{_phrase(ask.things[0], 1)} not {ask.relation} {_phrase(ask.things[1], 1)}"
    return _missing(detection, ask)


def _geneval(detection: Detection, ask: Ask) -> bool:
    for thing, count in zip(ask.things, ask.counts, strict=True):
        if count > 1 and sum(accepts(thing, o) for o in detection.objects) != count:
            return False
    return any(_related(chosen, ask, strict=False) for chosen in _assignments(detection.objects, ask.objects))


def _assignments(
    found: tuple[Found, ...], wanted: list[Wanted], chosen: tuple[Found, ...] = ()
) -> Iterator[tuple[Found, ...]]:
    """Every way to give each wanted object its own found one; aligned with `wanted`."""
    if len(chosen) == len(wanted):
        yield chosen
        return
    for i, candidate in enumerate(found):
        if accepts(wanted[len(chosen)], candidate):
            yield from _assignments(found[:i] + found[i + 1 :], wanted, (*chosen, candidate))


def _related(chosen: tuple[Found, ...], ask: Ask, strict: bool) -> bool:
    """Whether all objects of the first thing stand so to all of the second; `chosen` as `ask.objects`."""
    if ask.relation is None:
        return True
    holds = strict_relation if strict else geneval_relation
    first, second = chosen[: ask.counts[0]], chosen[ask.counts[0] :]
    return all(holds(a, ask.relation, b) for a in first for b in second)


def _missing(detection: Detection, ask: Ask) -> str:
    for thing, count in zip(ask.things, ask.counts, strict=True):
        if sum(accepts(thing, o) for o in detection.objects) < count:
            return f"no {_phrase(thing, count)}"
    return "no " + " and ".join(_phrase(w, n) for w, n in zip(ask.things, ask.counts, strict=True))


def _tally(detection: Detection) -> list[tuple[Wanted, int]]:
    """What is there and how often, in the order of the palette's names, large before small."""
    counts = Counter(Wanted(o.shape, o.color, o.size) for o in detection.objects)
    return sorted(counts.items(), key=lambda item: _rank(item[0]))


def _rank(thing: Wanted) -> tuple[int, int, int]:
    assert thing.shape is not None and thing.color is not None and thing.size is not None
    return SHAPES.index(thing.shape), COLORS.index(thing.color), -SIZES.index(thing.size)


def _phrase(thing: Wanted, count: int) -> str:
    """`one large red circle`, `two small blue squares`; figures beyond the grammar's numbers."""
    number = {1: "one"} | NUMBERS
    words = [number.get(count, str(count)), thing.size, thing.color]
    shape = "object" if thing.shape is None else thing.shape
    plural = "objects" if thing.shape is None else PLURAL[thing.shape]
    return " ".join([*(w for w in words if w is not None), shape if count == 1 else plural])


def _box(o: Found) -> tuple[float, float, float, float]:
    """Box centre and size: (x, y, width, height), pixels."""
    half, top, bottom = BOX[o.shape]
    return o.x, o.y + o.radius * (top + bottom) / 2, 2 * half * o.radius, (bottom - top) * o.radius


def _cell(o: Found) -> int:
    column, row = (int(min(max(c * 3 / CANVAS, 0.0), 2.0)) for c in (o.x, o.y))
    return 3 * row + column
