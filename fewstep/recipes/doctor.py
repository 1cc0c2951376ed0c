"""`fewstep doctor`: looks at the machine, then lets the bundled models prove that numbers come out right here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fewstep import noise
from fewstep.engine import artifact, doctor
from fewstep.engine.doctor import Finding
from fewstep.grids import shifted_grid
from fewstep.models import sd3
from fewstep.recipes.teacher import open_teacher
from fewstep.solvers import rollout
from fewstep.worlds.shapes import STUDENT_4, TEACHER
from fewstep.worlds.shapes.data import to_uint8
from fewstep.worlds.shapes.detect import detect
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.score import score

PROMPTS = ("a red circle", "a blue square", "a yellow cross", "a green triangle")
NOISE = (-1.3538, 0.4189)  # what the address (seed 1, image 2, step 3) gives everywhere


def run(out: Path) -> bool:
    """Print all findings; False when one of them hinders everything.

    Args:
        out: where runs are to be written.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "environment": doctor.environment,
        "accelerators": doctor.accelerators,
        "room": lambda: doctor.room(out),
        "hub login": doctor.hub,
        "self-tests": self_tests,
    }
    failed = 0
    for what, check in checks.items():
        for finding in doctor.guarded(check, what):
            print(doctor.say(finding, sys.stdout.isatty()), flush=True)
            failed += finding.state == "FAIL"
    print(f"\n{failed} to mend before fewstep works here" if failed else "\nfewstep works here")
    return not failed


def self_tests() -> Iterator[Finding]:
    """Addressed noise, whole weights, and images of the bundled models that show what they should."""
    drawn = noise.normal((2,), seed=1, index=[2], step=3)[0].numpy()
    same = np.allclose(drawn, NOISE, atol=1e-3)
    fix = "" if same else "this build of torch draws other noise: results are right, but not those of other machines"
    yield Finding("ok" if same else "note", "noise", "as on every machine" if same else f"{drawn}, not {NOISE}", fix)
    for folder in (TEACHER, STUDENT_4):
        whole = artifact.exists(folder) and artifact.weights_hash(folder) == artifact.read(folder).weights
        fix = "" if whole else "pip install --force-reinstall fewstep, or git checkout fewstep/worlds"
        yield Finding("ok" if whole else "FAIL", folder.name, "whole" if whole else "damaged or missing weights", fix)
    right = drawn_right()
    good = right >= len(PROMPTS) - 1  # the teacher errs now and then
    fix = "" if good else "numbers go wrong here: try another build of torch"
    yield Finding("ok" if good else "FAIL", "drawing", f"{right} of {len(PROMPTS)} images show what was asked for", fix)


@torch.no_grad()
def drawn_right() -> int:
    """How many images of the bundled teacher, in eight guided steps, show what their prompt asks for."""
    teacher = open_teacher(TEACHER)
    start = noise.normal((16, 8, 8), seed=0, index=range(len(PROMPTS)), step=0)
    x0 = rollout(teacher.velocity, start, shifted_grid(8), teacher.encode(PROMPTS)).x[-1]
    images = to_uint8(sd3.decode(teacher.pipe, x0))
    return sum(score(detect(image), parse(text)).strict for image, text in zip(images, PROMPTS, strict=True))
