"""Which step loses what: a student and its teacher share the way from the same noise, and hand over at the student's times.

    python benchmarks/which_step.py --out runs/which_step                       # the bundled student: half an hour on a core
    python benchmarks/which_step.py --out runs/which_step --student runs/demo/05-merge --per-task 10

Where the teacher goes on from the student's states and is as good as on its own way, the steps before are not to blame;
where the student goes on from the teacher's states and is worse than the teacher, the steps after are. What both parts
cost less alone than together is lost because a step meets states that it was not trained on. Selection prompts: this
is a question that one asks before changing something.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.engine import artifact
from fewstep.engine.precision import fast_dtype
from fewstep.evaluate.outcomes import Outcome
from fewstep.flow import Velocity
from fewstep.grids import shifted_grid
from fewstep.models import sd3
from fewstep.recipes.teacher import open_teacher
from fewstep.report import numbers
from fewstep.stages import encoders, evaluate
from fewstep.worlds.shapes import STUDENT_4, TEACHER

TEACHER_ALONE, STUDENT_ALONE = "teacher alone", "student alone"
TASKS = ("overall", "two_object", "counting", "position", "color_attr")


def handed_over(first: Velocity, then: Velocity, at: float) -> Velocity:
    """`first` for steps that start above time `at`, `then` for the others; a batch shares its time."""

    def call(x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        return (first if float(t[0]) > at + 1e-6 else then)(x_t, t, cond)

    return call


def joined(first: Sequence[float], then: Sequence[float], at: float) -> tuple[float, ...]:
    """The times of one grid down to `at`, and of another from there on.

    Raises:
        ValueError: `at` is not a time of both.
    """
    if not all(any(abs(t - at) < 1e-6 for t in grid) for grid in (first, then)):
        raise ValueError(f"t = {at:g} is not a time of both grids: choose --steps so that the teacher stops there, too")
    return (*(t for t in first if t > at + 1e-6), at, *(t for t in then if t < at - 1e-6))


def arms(
    student: Velocity, grid: Sequence[float], teacher: Velocity, fine: Sequence[float], mark: str
) -> Iterator[evaluate.Arm]:
    """Both alone, and every way to share the way; the teacher has its guidance in it."""

    def arm(name: str, times: Sequence[float], velocity: Velocity) -> evaluate.Arm:
        return evaluate.Arm(name, tuple(times), 1.0, velocity, f"{mark} {name}")

    yield arm(TEACHER_ALONE, fine, teacher)
    yield arm(STUDENT_ALONE, grid, student)
    for at in grid[1:-1]:
        yield arm(f"student to {at:g}, then teacher", joined(grid, fine, at), handed_over(student, teacher, at))
    for at in grid[1:-1]:
        yield arm(f"teacher to {at:g}, then student", joined(fine, grid, at), handed_over(teacher, student, at))


def measured(folder: Path, steps: int, asked: evaluate.Config, out: Path) -> dict[str, Outcome]:
    """Outcomes of all ways, by name.

    Raises:
        ValueError: no student of the bundled teacher, or one whose times a teacher of so many steps does not visit.
    """
    teacher, record = open_teacher(TEACHER), artifact.read(folder)
    if record.parents.get("teacher") != teacher.record.weights:
        raise ValueError(f"{folder} is not a student of the bundled teacher")
    network = sd3.load(folder, without=("vae", *sd3.ENCODERS)).transformer.to(sd3.home(teacher.pipe.transformer))
    reads = encoders.given(record.encoders, record.t5_tokens > 0, teacher.layout)
    student = encoders.told(sd3.velocity(network, fast_dtype(sd3.home(network))), reads)
    mark = f"{record.weights} {steps}"
    ways = list(arms(student, record.grid, teacher.velocity, shifted_grid(steps), mark))
    with torch.no_grad():
        made: dict[str, Outcome] = evaluate.run(asked, ways, teacher.pipe, teacher.record.t5_tokens, out, "select")["arms"]
    return made


def table(found: dict[str, Outcome]) -> list[str]:
    """Markdown: strict scores in percent, the paired difference from the teacher, images with something unreadable."""
    lines = [f"| way | {' | '.join(TASKS)} | against teacher | unreadable |", "|" + "---|" * (len(TASKS) + 3)]
    for name, outcome in found.items():
        strict = {r["task"]: r["mean"] for r in numbers.rows(outcome) if r["scoring"] == "strict"}
        cells = [f"{100 * strict[task]:.1f}" for task in TASKS]
        against = "–"
        if name != TEACHER_ALONE:
            pairs = numbers.compare(outcome, found[TEACHER_ALONE])
            d = next(p for p in pairs if p["scoring"] == "strict" and p["task"] == "overall")
            against = f"{numbers.points(d['diff'])} ({numbers.points(d['lo'])} to {numbers.points(d['hi'])})"
        unreadable = 100 * float(np.mean([r["unknown"] > 0 for r in outcome["results"]]))
        lines.append(f"| {name} | {' | '.join(cells)} | {against} | {unreadable:.1f} |")
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the images; the same command goes on")
    parser.add_argument("--student", type=Path, default=STUDENT_4, help="a student of the bundled teacher")
    parser.add_argument("--steps", type=int, default=32, help="of the teacher")
    parser.add_argument("--per-task", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    sd3.quiet()
    try:
        found = measured(args.student, args.steps, evaluate.Config(per_task=args.per_task, seeds=args.seeds), args.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(found[TEACHER_ALONE]['results'])} images a way\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
