"""What torchrun starts in tests: `processes.py TEACHER OUT TRAINED STAGES [KILLED]`; process KILLED dies on its way."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_recipe

from fewstep import cli
from fewstep.engine import ranks
from fewstep.engine.loop import train
from fewstep.models import roles
from fewstep.recipes import execute
from fewstep.recipes.pipeline import Distillation
from fewstep.stages import distribution

ROLES = {
    "full": roles.FULL,
    "lora": roles.Config(trained="lora", rank=4),
    "sharded": roles.Config(sharded=True, checkpointing=True),
}


def recipe(teacher: Path, trained: str) -> Distillation:
    """A tiny distillation; divided networks meet every switch that touches their weights."""
    made = tiny_recipe(teacher, 4, roles=ROLES[trained])
    if trained != "sharded":
        return made
    d = made.distribution
    heads, looks = replace(d.adversary, joint=True), replace(d.health, action="roll_back")  # remembers the best average
    return replace(made, distribution=replace(d, ida=0.9, adversary=heads, health=looks))


def main(teacher: str, out: str, trained: str, stages: str, killed: str = "") -> None:
    """Run stages; where a process is to die, checkpoint after every update."""
    torch.set_num_threads(1)
    ranks.begin()
    assert train.__kwdefaults__ is not None
    if killed:
        train.__kwdefaults__["checkpoint_every_s"] = -1.0
    if killed and ranks.rank() == int(killed):
        update, calls = distribution.update, []

        def dying(*given: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(*given)

        distribution.update = dying
    for stage in stages.split(","):
        execute.run(recipe(Path(teacher), trained), Path(out), stage)
    ranks.end()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    cli.app.cli = lambda **_: main(*arguments)  # type: ignore[method-assign]  # with the command's own way of ending
    cli.main()
