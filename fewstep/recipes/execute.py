"""Run a pipeline: stages in order, artefacts between them, nothing done twice (D12)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from fewstep.engine import files, ranks
from fewstep.engine.config import to_dict
from fewstep.recipes import distil, teach
from fewstep.recipes.layout import RESOLVED
from fewstep.recipes.pipeline import Distillation, Pipeline, TeacherTraining


def claim(pipeline: Pipeline, out: Path) -> None:
    """Write the resolved settings into the run's folder, or check that they are the ones it was begun with.

    Raises:
        ValueError: when the folder was begun with other settings; names the first that differs.
        OSError: when it cannot be written.
    """
    resolved, path = to_dict(pipeline), out / RESOLVED
    if path.exists():
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, (old, new) in differences(begun, resolved).items():
            raise ValueError(
                f"{out} was begun with {key} = {old!r}, now it is {new!r}: give the same settings to go on, "
                "or another --out to start anew"
            )
        return
    files.write(path, yaml.safe_dump(resolved, sort_keys=False))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process; the lock goes with the process, also when it is killed.

    Raises:
        ValueError: another process works in the folder.
    """
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process works in {out}: wait for it or stop it, or give another --out") from None
    with lock:
        yield


def differences(a: object, b: object, where: str = "") -> dict[str, tuple[object, object]]:
    """Dotted keys whose values differ between two nested settings, in order."""
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, tuple[object, object]] = {}
        for key in [*b, *(k for k in a if k not in b)]:
            found |= differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return found
    return {} if a == b else {where: (a, b)}


def run(pipeline: Pipeline, out: Path, stage: str | None = None) -> Path | None:
    """Run all stages, or one; whole artefacts are kept, checkpoints are gone on from.

    Args:
        pipeline: a recipe's settings.
        out: the run's folder.
        stage: only this one; what it needs must be there.

    Returns:
        The report, when the evaluation ran.

    Raises:
        ValueError: unknown stage, other settings than the folder was begun with, a missing or wrong artefact.
        OSError: full disk or unwritable folder; what is whole stays.
        FloatingPointError: a loss is not finite.
    """
    if stage is not None and stage not in pipeline.stages:
        raise ValueError(f"unknown stage {stage!r} of {pipeline.name}; one of {', '.join(pipeline.stages)}")
    if isinstance(pipeline, Distillation):  # before the folder is claimed with settings that cannot work
        distil.check(pipeline)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {out} ({error.strerror}): give --out a place you may write to") from None
    with held(pipeline, out):
        return _run(pipeline, out, stage)


@contextmanager
def held(pipeline: Pipeline, out: Path) -> Iterator[None]:
    """Hold a run's folder, which `claim` has given these settings; of several processes the first one does.

    Raises:
        ValueError: another process works in it, or it was begun with other settings.
    """
    with alone(out) if ranks.first() else nullcontext():
        with ranks.first_alone() as first:
            if first:
                claim(pipeline, out)
        yield


def _run(pipeline: Pipeline, out: Path, stage: str | None) -> Path | None:
    wanted = pipeline.stages if stage is None else (stage,)
    if isinstance(pipeline, TeacherTraining):
        if ranks.count() > 1:
            raise ValueError(f"{pipeline.name} runs in one process: start it without torchrun")
        return teach.run(pipeline, out, wanted)
    return distil.run(pipeline, out, wanted)
