"""What a recipe is: the settings of its stages, and how many network evaluations they cost."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from fewstep.data import prompt_files
from fewstep.grids import check_grid
from fewstep.models import roles
from fewstep.recipes import RECIPES
from fewstep.stages import (
    autoencoder,
    distribution,
    encoders,
    evaluate,
    gate,
    merge,
    split,
    teacher,
    trajectory,
)


def _refuse_empty(budgets: dict[str, int]) -> None:
    for key, value in budgets.items():
        if value < 1:
            raise ValueError(f"{key} = {value}: a budget of zero makes nothing; give at least 1")


@dataclass(frozen=True)
class Distillation:
    """Turn a teacher into a few-step student.

    Attributes:
        name: the recipe's name.
        teacher: "bundled", or an artefact folder of kind teacher.
        data_teacher: another teacher, with the same text encoders and autoencoder, that makes the trajectories, such as a
            larger one (the paper's data come from SD3.5-Large); empty: the teacher itself.
        start: a student of the same teacher that this one starts from, such as one of more steps; empty: the teacher.
        grid: the student's grid, explicit numbers.
        resolution: pixels of an image's side; 0 is what the teacher was made for.
        teacher_steps: steps of the teacher that the student is measured against.
        prompts: "shapes", or a file of prompts (.txt, .csv, .tsv, .jsonl, .parquet), or a folder of images with captions.
        prompt_policy: what happens to prompts of a file that cannot be used as they are.
        roles: what of the networks is trained, and where.
        encoders: which text encoders the student does without, and how often.
        trajectory, distribution, split, merge, evaluate: settings of the stages.
        gate: what an export of the student may lose.
    """

    name: str
    teacher: str = "bundled"
    data_teacher: str = ""
    start: str = ""
    grid: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5, 0.0)
    resolution: int = 0
    teacher_steps: int = 32
    prompts: str = "shapes"
    prompt_policy: prompt_files.Policy = field(default_factory=prompt_files.Policy)
    roles: roles.Config = field(default_factory=roles.Config)
    encoders: encoders.Config = field(default_factory=encoders.Config)
    trajectory: trajectory.Config = field(default_factory=trajectory.Config)
    distribution: distribution.Config = field(default_factory=distribution.Config)
    split: split.Config = field(default_factory=split.Config)
    merge: merge.Config = field(default_factory=merge.Config)
    evaluate: evaluate.Config = field(default_factory=evaluate.Config)
    gate: gate.Config = field(default_factory=gate.Config)

    stages = ("trajectory", "distribution", "split", "merge", "evaluate")

    def __post_init__(self) -> None:
        check_grid(self.grid)
        if self.resolution and (self.resolution < 0 or self.resolution % 16):
            raise ValueError(f"resolution must be a multiple of 16 pixels, or 0 for the teacher's own, got {self.resolution}")
        if self.resolution and self.evaluate.benchmark == "shapes":
            raise ValueError("the bundled world has one resolution: leave resolution at 0, or set evaluate.benchmark=pictures")
        if self.evaluate.benchmark == "pictures" and min(self.evaluate.seeds, self.merge.seeds) < 2:
            raise ValueError("distances are told in the distance of two seeds: give evaluate.seeds and merge.seeds at least 2")
        if self.roles.trained == "lora" and self.distribution.ida < 1:
            raise ValueError("ida averages weights, and adapters are factors: set distribution.ida=1, or roles.trained=full")
        budgets = {
            "trajectory.images": self.trajectory.images,
            "trajectory.batch": self.trajectory.batch,
            "trajectory.trajectories": self.trajectory.trajectories,
            "trajectory.teacher_substeps": self.trajectory.teacher_substeps,
            "distribution.images": self.distribution.images,
            "distribution.batch": self.distribution.batch,
            "evaluate.per_task": self.evaluate.per_task,
            "evaluate.seeds": self.evaluate.seeds,
            "evaluate.batch": self.evaluate.batch,
            "evaluate.pictures": self.evaluate.pictures,
            "teacher_steps": self.teacher_steps,
        }
        _refuse_empty(budgets)
        for name, size in (("trajectory", self.trajectory.micro_batch), ("distribution", self.distribution.micro_batch)):
            if size < 0:
                raise ValueError(f"{name}.micro_batch must not be negative, got {size}; 0 is the whole batch")
        batches = {"trajectory": self.trajectory.batch, "distribution": self.distribution.batch}
        for name, batch in (batches | {"split": self.distribution.batch}).items():
            images, source = getattr(self, name).images, "distribution" if name == "split" else name
            if images < batch:
                raise ValueError(f"{name}.images = {images} is less than one update of {batch} ({source}.batch)")

    @property
    def student_name(self) -> str:
        """Name of the student in reports: `student_4`."""
        return f"student_{len(self.grid) - 1}"


@dataclass(frozen=True)
class TeacherTraining:
    """Train the bundled teacher.

    Attributes:
        name: the recipe's name.
        reuse_autoencoder: take the bundled autoencoder instead of training one (which costs about an hour).
        autoencoder, teacher, evaluate: settings of the stages.
        teacher_steps: steps it is measured at.
        guidance_scales: tried on selection prompts; the best goes into the artefact.
    """

    name: str
    reuse_autoencoder: bool = False
    autoencoder: autoencoder.Config = field(default_factory=autoencoder.Config)
    teacher: teacher.Config = field(default_factory=teacher.Config)
    evaluate: evaluate.Config = field(default_factory=evaluate.Config)
    teacher_steps: int = 32
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0)

    stages = ("autoencoder", "teacher", "evaluate")

    def __post_init__(self) -> None:
        reading = self.teacher.reading
        budgets = {
            "autoencoder.batch": self.autoencoder.batch,
            "teacher.images": self.teacher.images,
            "teacher.batch": self.teacher.batch,
            "teacher.latents": self.teacher.latents,
            "teacher.reading.captions": reading.captions,
            "teacher.reading.batch": reading.batch,
            "evaluate.per_task": self.evaluate.per_task,
            "evaluate.seeds": self.evaluate.seeds,
            "evaluate.batch": self.evaluate.batch,
            "teacher_steps": self.teacher_steps,
        }
        _refuse_empty(budgets)
        for key, images, batch in (
            ("teacher.images", self.teacher.images, self.teacher.batch),
            ("teacher.reading.captions", reading.captions, reading.batch),
        ):
            if images < batch:
                raise ValueError(f"{key} = {images} is less than one update of {batch} ({key.rpartition('.')[0]}.batch)")


Pipeline = Distillation | TeacherTraining


def build(name: str) -> Pipeline:
    """The pipeline of a recipe.

    Raises:
        ValueError: unknown name, with the nearest one.
    """
    from fewstep.recipes import sd35, shapes

    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(RECIPES)}"
        raise ValueError(f"unknown recipe {name!r}; {hint}")
    pipeline: Pipeline = getattr(sd35 if name.startswith("sd35_") else shapes, name)()
    return pipeline
