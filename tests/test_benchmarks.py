"""What the benchmarks rest on: exact scene probabilities, ways that are shared, and a gallery whose broken runs are caught."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fewstep.engine import health
from fewstep.engine.config import override
from fewstep.flow import Velocity
from fewstep.grids import STUDENT_GRIDS, shifted_grid
from fewstep.solvers import rollout
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.prompts import training_scene

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GALLERY = load("health_gallery")


@pytest.mark.parametrize("caption", ["a red circle", "two small red circles", "a blue square left of a yellow cross"])
def test_scenes_are_drawn_with_the_probabilities_that_the_exact_answer_takes(caption: str) -> None:
    scenes, probability = load("teacher_gap").scenes_of(caption)
    number = {scene: i for i, scene in enumerate(scenes)}
    drawn, rng = np.zeros(len(scenes)), np.random.default_rng(0)
    for _ in range(1500):
        drawn[number[training_scene(parse(caption), rng)]] += 1
    expected = 1500 * probability.numpy()
    chi_square = float(((drawn - expected) ** 2 / expected).sum()) / (len(scenes) - 1)
    assert chi_square < 1 + 4 * np.sqrt(2 / (len(scenes) - 1))  # four deviations


def test_ways_that_are_shared_join_at_the_students_times() -> None:
    which = load("which_step")
    grid, fine = STUDENT_GRIDS[4], shifted_grid(32)
    asked: list[tuple[str, float]] = []

    def velocity(name: str) -> Velocity:
        def call(x_t: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
            asked.append((name, float(t[0])))
            return torch.zeros_like(x_t)

        return call

    ways = list(which.arms(velocity("student"), grid, velocity("teacher"), fine, "m"))
    assert [way.name for way in ways[:2]] == ["teacher alone", "student alone"] and len(ways) == 2 + 2 * 3
    for way in ways[2:]:
        asked.clear()
        rollout(way.velocity, torch.zeros(1, 1), way.grid, None)
        at, first = float(way.name.split()[2].strip(",")), way.name.split()[0]
        assert all((name == first) == (t > at + 1e-6) for name, t in asked)  # the step that starts at `at` is the other's
        own = [t for name, t in asked if name == "student"]
        assert own == pytest.approx([t for t in grid[:-1] if (t > at) == (first == "student")])
        theirs = [t for name, t in asked if name == "teacher"]
        assert theirs == pytest.approx([t for t in fine[:-1] if (t > at + 1e-6) == (first == "teacher")])
    with pytest.raises(ValueError, match="choose --steps"):
        which.joined(grid, shifted_grid(30), 0.9)


def said_of(name: str) -> set[str]:
    """Figures that a recorded run of the gallery is blamed for, by the bands that are shipped."""
    record = json.loads((ROOT / "docs" / "health" / f"{name}.json").read_text())
    settings = record["settings"]
    verdicts = health.judge(record["looks"], health.reference(), settings["health"]["patience"], settings)
    return {verdict.figure for verdict in verdicts}


@pytest.mark.parametrize("name", GALLERY.BROKEN)
def test_every_broken_run_of_the_gallery_is_caught_by_what_gives_it_away(name: str) -> None:
    assert GALLERY.BROKEN[name][1] in said_of(name)


def test_nothing_is_said_of_a_healthy_run_that_the_bands_have_not_seen() -> None:
    assert said_of(GALLERY.UNSEEN) == set()


def test_the_plan_is_what_the_allocator_tells() -> None:
    """Memory as planned without numbers, against what two updates of each stage really took."""
    full_size = load("full_size")
    for name, pipeline in full_size.rehearsals("tiny", 8):
        pipeline = override(pipeline, ["roles.frozen_dtype=float32"])  # tests are held to AVX2
        made = full_size.training(pipeline, full_size.TINY, "cpu")
        full_size.compare(made, pipeline, full_size.TINY)
        for stage in ("trajectory", "distribution"):
            assert 0.85 < made[stage]["plan_over_measured"] < 1.15, (name, stage, made[stage])
