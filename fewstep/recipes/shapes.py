"""Recipes of the bundled world. Every number can be changed with `--set section.key=value`."""

from __future__ import annotations

from fewstep.grids import STUDENT_GRIDS
from fewstep.recipes.pipeline import Distillation, TeacherTraining
from fewstep.stages import evaluate


def shapes_4step() -> Distillation:
    """The bundled teacher to 4 steps."""
    return Distillation(name="shapes_4step", grid=STUDENT_GRIDS[4])


def shapes_2step() -> Distillation:
    """The bundled teacher to 2 steps."""
    return Distillation(name="shapes_2step", grid=STUDENT_GRIDS[2])


def shapes_teacher() -> TeacherTraining:
    """The bundled teacher itself."""
    return TeacherTraining(name="shapes_teacher", evaluate=evaluate.Config(per_task=40, seeds=2))
