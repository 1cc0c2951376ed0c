"""How far the bundled teacher is from the exact answer: the mean of all scenes that a caption allows, given the noise.

    python benchmarks/teacher_gap.py                                   # the bundled teacher, about two minutes
    python benchmarks/teacher_gap.py --teacher runs/shapes_teacher/01-teacher

For captions whose scenes can be counted, the best possible x0 at a noisy point is known in closed form: every scene's
latent, weighted by how likely it made the point. The table shows the mean square error of that answer and of the
network's, per element, at several times. What lies between them is what more training could still bring; where it is
largest says where training should dwell.
"""

from __future__ import annotations

import argparse
import itertools
from math import hypot
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep import noise
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity, interpolate, x0_from_velocity
from fewstep.models import sd3
from fewstep.worlds.shapes import TEACHER
from fewstep.worlds.shapes.architecture import MAX_TOKENS
from fewstep.worlds.shapes.data import to_pixels
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.prompts import HELD_OUT
from fewstep.worlds.shapes.render import render
from fewstep.worlds.shapes.scene import (
    CANVAS,
    COLORS,
    GAP,
    MARGIN,
    PITCH,
    RADIUS,
    SIZES,
    SQUARE_REACH,
    Object,
    Scene,
    Wanted,
    relation_holds,
)

CAPTIONS = (
    "a circle",
    "a red circle",
    "two small red circles",
    "a blue square and a yellow cross",
    "a blue square left of a yellow cross",
)
TIMES = (0.5, 0.7, 0.8, 0.9, 0.95)


def places(radius: float) -> list[int]:
    """Coordinates that the lattice leaves free for an object."""
    return [x for x in range(0, CANVAS + 1, PITCH) if radius + MARGIN <= x <= CANVAS - radius - MARGIN]


def attributes(wanted: Wanted) -> list[tuple[str, str, str]]:
    """All completions of what is open."""
    assert wanted.shape is not None
    colors = [wanted.color] if wanted.color else COLORS
    sizes = [wanted.size] if wanted.size else SIZES
    return [(wanted.shape, color, size) for color in colors for size in sizes]


def layouts(radii: list[float], tries: int) -> dict[tuple[tuple[int, int], ...], float]:
    """Every way to put objects on the lattice one after another, with its probability when each has so many tries."""
    found: dict[tuple[tuple[int, int], ...], float] = {(): 1.0}
    for radius in radii:
        everywhere = list(itertools.product(places(radius), repeat=2))
        longer: dict[tuple[tuple[int, int], ...], float] = {}
        for taken, probability in found.items():
            free = [p for p in everywhere if all(apart(p, q, radius + radii[j]) for j, q in enumerate(taken))]
            reached = 1 - (1 - len(free) / len(everywhere)) ** tries
            longer |= {(*taken, p): probability * reached / len(free) for p in free}
        found = longer
    return found


def apart(p: tuple[int, int], q: tuple[int, int], radii: float) -> bool:
    """Whether two centres keep their distance."""
    return hypot(p[0] - q[0], p[1] - q[1]) > SQUARE_REACH * radii + GAP


def scenes_of(caption: str) -> tuple[list[Scene], Tensor]:
    """Every training scene of a caption, and its probability (N,), as `scene.place` draws it."""
    ask = parse(caption)
    assert ask.relation != "larger than"
    scenes: list[Scene] = []
    weights: list[float] = []
    for chosen in itertools.product(*(attributes(w) for w in ask.objects)):
        if any((shape, color) in HELD_OUT for shape, color, _ in chosen):
            continue
        radii = [RADIUS[size] for _, _, size in chosen]  # type: ignore[index]
        drawn = [
            (
                Scene(
                    tuple(
                        Object(shape, color, size, float(x), float(y), r)  # type: ignore[arg-type]
                        for (shape, color, size), (x, y), r in zip(chosen, at, radii, strict=True)
                    )
                ),
                probability,
            )
            for at, probability in layouts(radii, 20 if ask.relation is None else 60).items()
        ]
        factor = 1.0
        if ask.relation is not None:  # placed once, then placed anew up to 60 times until the relation holds
            relation = ask.relation
            others = sum(p for s, p in drawn if not relation_holds(s.objects[0], relation, s.objects[1]))
            drawn = [(s, p) for s, p in drawn if relation_holds(s.objects[0], relation, s.objects[1])]
            factor = sum(layouts(radii, 20).values()) * sum(others**k for k in range(60))
        scenes += [scene for scene, _ in drawn]
        weights += [factor * p for _, p in drawn]
    probability = torch.tensor(weights)
    return scenes, probability / probability.sum()


@torch.no_grad()
def errors(velocity: Velocity, latents: Tensor, probability: Tensor, cond: object, t: float, count: int) -> tuple[float, float]:
    """Mean square errors of x0 at time t: of the exact posterior mean, and of the network."""
    generator = torch.Generator().manual_seed(0)
    x0 = latents[torch.multinomial(probability, count, True, generator=generator)]
    eps = noise.normal(x0.shape[1:], seed=0, index=range(count), step=0)
    times = torch.full((count,), t)
    x_t = interpolate(x0, eps, times)
    flat, point = latents.flatten(1), x_t.flatten(1)
    likelihood = ((1 - t) * point @ flat.T - 0.5 * (1 - t) ** 2 * flat.square().sum(1)) / t**2
    exact = ((likelihood + probability.log()).softmax(1) @ flat).view_as(x0)
    network = x0_from_velocity(x_t, velocity(x_t, times, cond), times)
    return float((exact - x0).square().mean()), float((network - x0).square().mean())


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--count", type=int, default=256, help="noisy points for each caption and time")
    args = parser.parse_args()
    pipe = sd3.load(args.teacher)
    velocity = sd3.velocity(pipe.transformer, fast_dtype())
    print("| caption | scenes | " + " | ".join(f"t = {t:g}" for t in TIMES) + " |")
    print("|---" * (2 + len(TIMES)) + "|")
    for caption in CAPTIONS:
        scenes, probability = scenes_of(caption)
        chunks = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
        latents = torch.cat([sd3.encode_pixels(pipe, to_pixels(np.stack([render(s) for s in chunk]))) for chunk in chunks])
        cond = sd3.encode(pipe, [caption], MAX_TOKENS).expand(args.count)
        found = [errors(velocity, latents, probability, cond, t, args.count) for t in TIMES]
        cells = " | ".join(f"{exact:.3f} / {network:.3f}" for exact, network in found)
        print(f"| {caption} | {len(scenes)} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
