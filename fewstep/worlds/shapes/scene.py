"""Scenes of the shapes world: what is where, in which colour and size. The scene is the ground truth.

Lengths are pixels on a 64 x 64 canvas, x to the right, y down; a scene never depends on how it is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, hypot
from typing import Literal, get_args

import numpy as np

WORLD_VERSION = 3  # enters every data hash: raise it when scenes, pixels or captions change
CANVAS = 64

Shape = Literal["circle", "square", "triangle", "cross"]
Color = Literal["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
Size = Literal["small", "large"]
Relation = Literal["left of", "right of", "above", "below"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
SIZES: tuple[Size, ...] = get_args(Size)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

# sRGB. The closest pair is 0.17 apart in OKLab and the background 0.18 from its nearest colour (a test measures both).
RGB: dict[Color, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "orange": (245, 130, 15),
    "yellow": (245, 220, 30),
    "green": (30, 150, 50),
    "cyan": (30, 200, 215),
    "blue": (35, 65, 205),
    "purple": (130, 40, 165),
    "pink": (250, 125, 190),
}
BACKGROUND_RGB = (226, 226, 226)

RADIUS: dict[Size, float] = {"small": 7.0, "large": 12.0}
# Centres lie on the nine points where four patches of the transformer meet. With free positions a teacher of this size
# spends what it can learn in an hour on drawing edges anywhere and on finding things in noise, and nothing is left for
# what a caption says (docs/LOG.md, 2026-11-24).
PITCH = 16
MARGIN = 0.5  # pixels kept free between a circle and the edge of the canvas
SQUARE_REACH = 1.22  # a square's corner reaches 1.22 radii; two base corners of triangles, 1.39, rarely meet
GAP = 2.0  # pixels kept free between the circumscribed circles of two objects


@dataclass(frozen=True)
class Object:
    """One shape. `x`, `y` are its centre in pixels, `radius` its nominal radius in pixels, 7 or 12."""

    shape: Shape
    color: Color
    size: Size
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Objects on the light background; order carries no meaning."""

    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Wanted:
    """What is known of one object before it is placed; None leaves the attribute open."""

    shape: Shape | None = None
    color: Color | None = None
    size: Size | None = None


def relation_holds(a: Object, relation: Relation, b: Object) -> bool:
    """Whether `a` is clearly `relation` `b`: within 30 degrees of the axis, so that no scene is ambiguous (ours)."""
    dx, dy = a.x - b.x, a.y - b.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and abs(across) <= along * np.tan(np.pi / 6)


def place(
    wanted: list[Wanted], rng: np.random.Generator, relation: Relation | None = None, tries: int = 4000
) -> Scene:
    """Draw a scene that satisfies `wanted`: open attributes uniform, then places one by one among those that are free.

    What does not fit is drawn again, attributes too, so crowded requests show more small things than large ones.

    Args:
        wanted: one entry per object, at most five.
        rng: numpy generator; the scene is a function of its state.
        relation: if given, object 0 is clearly `relation` object 1.
        tries: rejection-sampling budget; twenty for the place of one object, then attributes are drawn anew, too.

    Raises:
        ValueError: if the objects do not fit.
    """
    for _ in range(tries // 20):
        objects = [_attributes(w, rng) for w in wanted]
        placed = _positions([o.radius for o in objects], rng, 20)
        if placed is None:
            continue
        scene = [Object(o.shape, o.color, o.size, x, y, o.radius) for o, (x, y) in zip(objects, placed, strict=True)]
        if relation is None:
            return Scene(tuple(scene))
        turned = _turn_until(scene, relation, rng)
        if turned is not None:
            return Scene(tuple(turned))
    raise ValueError(f"{len(wanted)} objects do not fit on a {CANVAS} x {CANVAS} canvas: {wanted}")


def _attributes(w: Wanted, rng: np.random.Generator) -> Object:
    shape = w.shape or SHAPES[rng.integers(len(SHAPES))]
    color = w.color or COLORS[rng.integers(len(COLORS))]
    size = w.size or SIZES[rng.integers(len(SIZES))]
    return Object(shape, color, size, 0.0, 0.0, RADIUS[size])


def _positions(radii: list[float], rng: np.random.Generator, tries: int) -> list[tuple[float, float]] | None:
    placed: list[tuple[float, float]] = []
    for i, radius in enumerate(radii):
        first = ceil((radius + MARGIN) / PITCH)
        for _ in range(tries):
            x, y = PITCH * rng.integers(first, CANVAS // PITCH - first, size=2, endpoint=True)
            if all(
                hypot(x - px, y - py) > SQUARE_REACH * (radius + radii[j]) + GAP for j, (px, py) in enumerate(placed)
            ):
                placed.append((float(x), float(y)))
                break
        if len(placed) <= i:
            return None
    return placed


def _turn_until(scene: list[Object], relation: Relation, rng: np.random.Generator) -> list[Object] | None:
    """Re-place the whole scene until the first two objects stand in the relation."""
    radii = [o.radius for o in scene]
    for _ in range(60):
        placed = _positions(radii, rng, 60)
        if placed is None:
            return None
        moved = [Object(o.shape, o.color, o.size, x, y, o.radius) for o, (x, y) in zip(scene, placed, strict=True)]
        if relation_holds(moved[0], relation, moved[1]):
            return moved
    return None
