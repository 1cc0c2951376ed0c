"""Every switch of the method on the bundled teacher, with equal start and budget, several training runs each.

    python benchmarks/ablation.py --out runs/ablation                      # all cells, hours; the same command resumes
    python benchmarks/ablation.py --out runs/ablation --arms full,dmd2     # some of them
    python benchmarks/ablation.py --out runs/ablation_quick --quick        # ten minutes: directions, not numbers
    python benchmarks/ablation.py --out runs/ablation --write              # docs/RESULTS.md and its data, from what is there

A cell is one arm, number of steps and training run. All arms of a run start from one student after trajectory guidance
and get as many student updates; what split and merge would take goes into stage `distribution` where they are left out.
An arm without them is compared with the paper's recipe without them. Everything is measured on report prompts with one set
of initial noises; students trained on re-noised rollouts are sampled so, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from ablation_table import REFERENCE, STUDENT, write_results

from fewstep import noise
from fewstep.engine import artifact
from fewstep.engine.config import override, to_dict
from fewstep.engine.log import clock
from fewstep.engine.precision import fast_dtype
from fewstep.models import sd3
from fewstep.recipes import distil, execute, material
from fewstep.recipes.arms import teacher_arms
from fewstep.recipes.layout import FOLDER
from fewstep.recipes.pipeline import Distillation, build
from fewstep.recipes.teacher import open_for
from fewstep.report import page
from fewstep.solvers import renoising_rollout, rollout
from fewstep.stages import evaluate, split, watch

TRAJECTORIES, START, REFINED, SPLIT = 1_920, 38_400, 3_840, 640  # teacher trajectories, and student samples of each stage
BASE = [
    f"trajectory.trajectories={TRAJECTORIES}",
    f"trajectory.images={START}",
    f"distribution.images={REFINED}",
    f"split.images={SPLIT}",
    "distribution.health.looks=1",
    "merge.per_task=10",
    "merge.seeds=2",
    "evaluate.per_task=40",
    "evaluate.seeds=4",
]
QUICK = ["trajectory.trajectories=640", "trajectory.images=12800", "evaluate.per_task=8", "merge.per_task=2"]
QUICK += ["distribution.images=320", "split.images=160"]
ALONE = ["split.skip=true"]  # the budget of the split goes into stage `distribution`

# What each arm changes. "full" is the paper's recipe as we read it.
ARMS: dict[str, list[str]] = {
    "trajectory_only": [],
    "full": [],
    "dmd2": ["distribution.preset=dmd2", "distribution.adversary.weight=0.1", *ALONE],  # as strong an adversary as "full"
    "tdm": ["distribution.preset=tdm", *ALONE],
    "phased": ["distribution.preset=phased", *ALONE],
    "decoupled": ["distribution.preset=decoupled", *ALONE],
    "senseflow_like": ["distribution.preset=senseflow_like", *ALONE],
    "no_timestep_sharing": ["distribution.anchor=end"],
    "no_warm_start": ["trajectory.optim.lr=0", "trajectory.images=64"],
    "no_trajectory_term": ["distribution.trajectory_weight=0"],
    "no_adversary": ["distribution.adversary.weight=0"],
    "no_head_refresh": ["distribution.adversary.refresh=0"],
    "no_split": ALONE,
}
NOISE = 4242  # seed of fresh noise in re-noised rollouts
SHARED = "start"  # folder of what all arms of a run start from


def cell_settings(arm: str, steps: int, run: int, quick: bool) -> Distillation:
    """The recipe of one cell."""
    seeds = [f"trajectory.seed={1000 * run + 1}", f"distribution.seed={1000 * run + 2}", f"split.seed={1000 * run + 3}"]
    changes = [*BASE, *(QUICK if quick else []), *seeds, *ARMS[arm]]
    pipeline = build(f"shapes_{steps}step")
    assert isinstance(pipeline, Distillation)
    made = override(pipeline, changes)
    if made.split.skip or distil.idle(made):
        made = override(made, [f"distribution.images={made.distribution.images + made.split.images}", "split.skip=true"])
    return made


def start_of(out: Path, steps: int, run: int, quick: bool) -> Path:
    """Teacher trajectories and the student after trajectory guidance, which all arms of a run share; made once."""
    folder = out / f"{steps}step" / f"run{run}" / SHARED
    pipeline = cell_settings("trajectory_only", steps, run, quick)
    execute.run(pipeline, folder, "trajectory")
    return folder


def link(start: Path, cell: Path, parts: list[str]) -> None:
    """Let a cell use what its run shares."""
    cell.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (start / part).exists() and not (cell / part).exists():
            (cell / part).symlink_to(os.path.relpath(start / part, cell), target_is_directory=True)


def run_cell(out: Path, arm: str, steps: int, run: int, quick: bool) -> Path:
    """One cell; its `cell.json` says that it is done. Networks are deleted then, outcomes stay."""
    cell = out / f"{steps}step" / f"run{run}" / arm
    done = cell / "cell.json"
    pipeline = cell_settings(arm, steps, run, quick)
    if done.exists():
        if json.loads(done.read_text())["settings"] != json.loads(json.dumps(to_dict(pipeline))):
            raise SystemExit(f"{cell} was made with other settings: give another --out")
        return done
    begun, start = time.monotonic(), start_of(out, steps, run, quick)
    link(start, cell, ["trajectories", "held_out", *([] if arm == "no_warm_start" else [FOLDER["trajectory"]])])
    if arm == "trajectory_only":
        stages: list[str] = []
    else:
        stages = ["trajectory"] if arm == "no_warm_start" else []
        stages += ["distribution", "split", "merge"]
    for stage in stages:
        execute.run(pipeline, cell, stage)
    student = cell / FOLDER["trajectory" if arm == "trajectory_only" else "merge"]
    measured = measure(pipeline, cell, student, out / f"{steps}step" / REFERENCE)
    record = {"arm": arm, "steps": steps, "run": run, "minutes": (time.monotonic() - begun) / 60}
    record |= {"settings": to_dict(pipeline), **measured}
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(done)
    for folder in ("distribution", "split", "merge"):
        shutil.rmtree(cell / FOLDER[folder], ignore_errors=True)
    shutil.rmtree(cell / "work", ignore_errors=True)
    if not (start / "held_out").exists() and (cell / "held_out").is_dir():  # the first cell of a run made it
        shutil.move(cell / "held_out", start / "held_out")
    return done


@torch.no_grad()
def measure(pipeline: Distillation, cell: Path, student: Path, reference: Path) -> dict[str, Any]:
    """Outcome of a student on the report prompts, and the distance of its states from the teacher's on held-out ones."""
    teacher, made = open_for(pipeline, cell), artifact.read(student)
    velocity = sd3.velocity(sd3.load(student).transformer, fast_dtype())
    renoise = pipeline.distribution.rollout == "sde"  # sampled as it was trained
    arm = evaluate.Arm(STUDENT, made.grid, made.guidance_scale, velocity, made.weights, renoise)
    of_teacher = teacher_arms(teacher.pipe, teacher.record, pipeline.teacher_steps, len(pipeline.grid) - 1)
    for arms, folder in (([arm], cell / page.EVALUATION), (of_teacher, reference)):
        evaluate.run(pipeline.evaluate, arms, teacher.pipe, teacher.record.t5_tokens, folder)
    held_out = material.held_out(pipeline, cell, teacher)
    assert held_out is not None
    x, cond = held_out.stored.x, held_out.cond

    def fresh(i: int) -> torch.Tensor:
        return noise.normal(x.shape[2:], seed=NOISE, index=range(len(x)), step=i)

    start = velocity, x[:, 0], pipeline.grid, cond
    path = renoising_rollout(*start, fresh) if renoise else rollout(*start)
    states = [watch.apart(path.x[i], x[:, i]) for i in range(1, len(pipeline.grid))]
    return {"marginals": states, "grid": pipeline.grid, "renoise": renoise}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated; all by default")
    parser.add_argument("--steps", default="4,2", help="comma-separated numbers of steps")
    parser.add_argument("--runs", type=int, default=3, help="training runs of each arm")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further cell after this time")
    parser.add_argument("--quick", action="store_true", help="one run of 4 steps with small budgets: ten minutes")
    parser.add_argument("--write", action="store_true", help="write docs/RESULTS.md from the cells that are done; no cell runs")
    args = parser.parse_args()
    arms, steps = args.arms.split(","), [int(s) for s in args.steps.split(",")]
    unknown = [a for a in arms if a not in ARMS]
    if unknown:
        parser.error(f"unknown arm {unknown[0]}; one of {', '.join(ARMS)}")
    if args.quick:
        steps, args.runs = [4], 1
    sd3.quiet()
    if not args.write:
        begun = time.monotonic()
        for run in range(1, args.runs + 1):  # run by run: whatever is done early is a whole comparison
            for count in steps:
                for arm in arms:
                    if arm == "no_split" and split.idle(build(f"shapes_{count}step").grid, 0.5):  # the same as "full"
                        continue
                    spent = time.monotonic() - begun
                    if spent < 60 * args.minutes:
                        print(f"== {count} steps, run {run}, {arm} ({clock(spent)} so far)", flush=True)
                        run_cell(args.out, arm, count, run, args.quick)
    write_results(args.out, publish=args.write and not args.quick)


if __name__ == "__main__":
    main()
