"""Run a recipe and be killed (SIGKILL) at a chosen call: `python killed.py TEACHER OUT STEPS PLACE CALL [full|lora]`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_recipe

from fewstep.data import shards, trajectories
from fewstep.engine import checkpoint
from fewstep.engine.loop import train
from fewstep.evaluate import outcomes
from fewstep.models import roles
from fewstep.recipes import execute
from fewstep.stages import distribution, merge, trajectory

SHARD = 2  # small shards, so that trajectories are written in three

# Where to die: the function whose CALL-th call is the last thing done.
PLACES: dict[str, tuple[Any, str]] = {
    "trajectories": (shards.TarWriter, "close"),  # a shard is written, but has not its name yet
    "trajectory": (trajectory, "update"),
    "checkpoint": (checkpoint, "save_file"),  # a checkpoint is half-written
    "distribution": (distribution, "student_update"),
    "split": (distribution, "student_update"),  # the same, counted on until the next stage
    "merge": (merge, "choose"),  # all candidates are measured
    "evaluation": (outcomes, "save_file"),  # pictures of an arm are there, verdicts are not
}


def dying(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`call`, after whose `at`-th return nothing follows."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = call(*args, **kwargs)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def main(teacher: str, out: str, steps: str, place: str, call: str, trained: Any = "full") -> None:
    """Checkpoint after every update, and die."""
    torch.set_num_threads(1)
    assert train.__kwdefaults__ is not None
    train.__kwdefaults__["checkpoint_every_s"] = -1.0
    trajectories.SHARD = SHARD
    owner, name = PLACES[place]
    setattr(owner, name, dying(getattr(owner, name), int(call)))
    made = roles.FULL if trained == "full" else roles.Config(trained=trained, rank=4)
    execute.run(tiny_recipe(Path(teacher), int(steps), roles=made), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
