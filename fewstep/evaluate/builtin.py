"""Protocols that are known by name: the bundled world's, and GenEval's prompts. COCO's are in `coco`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.evaluate.geneval import prompts
from fewstep.evaluate.protocol import shapes_protocol
from fewstep.worlds.shapes.detect import DETECTOR_VERSION
from fewstep.worlds.shapes.scene import WORLD_VERSION

PER_TASK, SEEDS = 60, 4


def shapes(scoring: Literal["strict", "geneval"], per_task: int = PER_TASK, seeds: int = SEEDS) -> Benchmark:
    """Report prompts of the bundled world: the prompts and noise of the stage `evaluate`, so the verdicts are the same.

    Args:
        scoring: which verdict is the score; both are made.
        per_task: prompts of each task; a small task gives all it has.
        seeds: images of each prompt.

    Raises:
        ValueError: `per_task` below 1, or seeds out of range.
    """
    asked = shapes_protocol("report", per_task, seeds)
    return Benchmark(
        name=f"shapes-{scoring}",
        entries=tuple(Entry(p.text, p.task) for p in asked.prompts),
        seeds=seeds,
        evaluator={"detector": str(DETECTOR_VERSION), "world": str(WORLD_VERSION), "scoring": scoring},
        noise_seed=asked.noise_seed,
        version=asked.version,
    )


def is_shapes(benchmark: Benchmark) -> bool:
    """Whether the bundled world's detector reads a benchmark: by what it says of itself, whatever it is called."""
    return "world" in benchmark.evaluator


def geneval(seeds: int = SEEDS) -> Benchmark:
    """GenEval: 553 prompts of six tasks, by default four images of each, with what to look for as facts."""
    entries = tuple(
        Entry(p["prompt"], p["tag"], {key: p[key] for key in ("include", "exclude") if key in p}) for p in prompts()
    )
    return Benchmark("geneval", entries, seeds, {"rules": "geneval"})


def first(benchmark: Benchmark, per_category: int) -> Benchmark:
    """The first prompts of every category: a smaller benchmark with a name and hash of its own.

    Raises:
        ValueError: `per_category` below 1.
    """
    if per_category < 1:
        raise ValueError(f"prompts of a category must be at least 1, not {per_category}")
    counts: dict[str, int] = {}
    chosen = []
    for entry in benchmark.entries:
        counts[entry.category] = counts.get(entry.category, 0) + 1
        if counts[entry.category] <= per_category:
            chosen.append(entry)
    if len(chosen) == len(benchmark.entries):
        return benchmark
    return replace(benchmark, name=f"{benchmark.name}-first{per_category}", entries=tuple(chosen))
