"""Recipes of the bundled world. Every number can be changed with `--set section.key=value`."""

from __future__ import annotations

from dataclasses import replace

from fewstep.grids import STUDENT_GRIDS
from fewstep.recipes.pipeline import Distillation, TeacherTraining
from fewstep.stages import distribution, evaluate


def shapes_4step() -> Distillation:
    """The bundled teacher to 4 steps."""
    return _distillation("shapes_4step", STUDENT_GRIDS[4])


def shapes_2step() -> Distillation:
    """The bundled teacher to 2 steps."""
    return _distillation("shapes_2step", STUDENT_GRIDS[2])


def shapes_teacher() -> TeacherTraining:
    """The bundled teacher itself."""
    return TeacherTraining(name="shapes_teacher", evaluate=evaluate.Config(per_task=40, seeds=2))


def _distillation(name: str, grid: tuple[float, ...]) -> Distillation:
    # Minutes, not days: a small network learns by larger steps, and one proxy update a student update leaves time for five
    # times as many of those. Chosen on selection prompts (docs/LOG.md, 2026-11-25).
    usual = distribution.Config()
    refinement = replace(
        usual,
        trajectory_weight=0.05,
        proxy_updates=1,
        adversary=replace(usual.adversary, weight=0.1),
        optim=replace(usual.optim, lr=4e-4),
        proxy_optim=replace(usual.proxy_optim, lr=4e-4),
    )
    return Distillation(name=name, grid=grid, distribution=refinement)
