"""`fewstep cache`: everything that a run learns from, made beforehand: text conditions and teacher trajectories.

The files are those that `fewstep run` in the same folder would make. A manifest names them with their hashes, so that a folder
that was copied to another machine can be checked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

from fewstep.engine import ranks
from fewstep.recipes import distil, execute, material, memory
from fewstep.recipes.layout import timed
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.teacher import CONDITIONS, open_for

MANIFEST = "cache.json"
FOLDERS = (CONDITIONS, "trajectories", "held_out")
AT_ONCE = 2**24  # bytes that are hashed at once


def run(pipeline: Distillation, out: Path) -> Path:
    """Make what is not there yet; under torchrun processes share the work. Returns the manifest.

    Raises:
        ValueError: too little disk, settings other than the folder was begun with, or as `distil.check`.
        OSError: `out` cannot be written.
    """
    distil.check(pipeline)
    out.mkdir(parents=True, exist_ok=True)
    with execute.held(pipeline, out):
        with ranks.first_alone() as first:
            if first:
                _estimate(pipeline, out)
        teacher = open_for(pipeline, out, material.all_prompts(pipeline, out))
        with timed(out, "trajectories"):
            material.stored(pipeline, out, teacher)
            material.held_out(pipeline, out, teacher)
        if ranks.first():
            write_manifest(out)
    return out / MANIFEST


def _estimate(pipeline: Distillation, out: Path) -> None:
    """Say how much is to be written, and refuse where it does not fit."""
    needed, free = memory.disk(pipeline, len(set(material.all_prompts(pipeline, out)))), shutil.disk_usage(out).free
    missing = needed - sum(file.stat().st_size for folder in FOLDERS for file in (out / folder).rglob("*.tar"))
    if missing > free:
        sizes = f"{free / memory.GIB:.1f} GiB of disk left, {missing / memory.GIB:.1f} are needed"
        raise ValueError(f"{out} has {sizes}: choose another --out")
    print(f"{max(0.0, missing) / memory.GIB:.2f} GiB to be written into {out}", file=sys.stderr)


def write_manifest(out: Path) -> None:
    """Name every file with its size and hash."""
    files = [file for folder in FOLDERS for file in sorted((out / folder).rglob("*.tar"))]
    told = {file.relative_to(out).as_posix(): {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in files}
    partial = out / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(told, indent=1) + "\n")
    partial.replace(out / MANIFEST)


def check(out: Path, mend: bool = False) -> list[str]:
    """What is missing or damaged in a cache, in words; with `mend` damaged files are deleted, so that they are made again.

    Raises:
        ValueError: no manifest, or a damaged one.
    """
    manifest = out / MANIFEST
    try:
        told = json.loads(manifest.read_text())
    except FileNotFoundError:
        raise ValueError(f"{out} holds no cache: {MANIFEST} is missing; `fewstep cache RECIPE --out {out}` makes one") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{manifest} is damaged ({error}): make the cache again, whole files are kept") from None
    found = []
    for name, wanted in told.items():
        file = out / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != wanted["bytes"] or _hash(file) != wanted["sha256"]:
            found.append(f"{name} is damaged")
            if mend:
                file.unlink()
    return found


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()
