"""Artefacts: a diffusers folder and, beside it, `artifact.json` that says what it is and where it came from (D6)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fewstep import __version__
from fewstep.conditioning import ENCODERS
from fewstep.engine.checkpoint import whole_folder

Kind = Literal[
    "teacher", "student_trajectory", "student_distribution", "student_low", "student_high", "student", "export"
]
MAKER: dict[str, str] = {
    "teacher": "teacher",
    "student_trajectory": "trajectory",
    "student_distribution": "distribution",
    "student_low": "split",
    "student_high": "split",
    "student": "merge",
    "export": "export",
}
RECORD = "artifact.json"
HASHED_AT_ONCE = 2**24  # bytes: weights may be larger than memory


@dataclass(frozen=True)
class Artifact:
    """What a model folder is.

    Attributes:
        kind: what the model is; `MAKER` names the stage that makes each kind.
        recipe: name of the recipe.
        grid: times the model is sampled at, decreasing, ending in 0.
        guidance_scale: to sample with; 1 is off.
        t5_tokens: T5 tokens it was trained with: `max_sequence_length` of the stock pipeline. 0: it is given none, not even
            zeros.
        images_seen: training images of this stage.
        resolution: pixels of an image's side that it was made for; 0 is the network's own.
        encoders: text encoders that it is to be sampled with; zeros stand for the others.
        format: how its weights are written; "diffusers" opens as a pipeline.
        bits: asked for, of an average weight that may be rounded; scales and offsets come on top, or are counted where they
            make the number (GGUF's Q5_1 has six bits with them).
        passed: whether it passed its gate; None where there was none.
        parents: sha256 of the weights it was made from, by kind.
        weights: sha256 of its own transformer weights.
        metrics: figures of the stage that made it.
        config: the stage's resolved settings.
        note: a sentence on how it was made, where the settings alone do not say.
        fewstep: version that wrote it.
    """

    kind: Kind
    recipe: str
    grid: tuple[float, ...]
    guidance_scale: float
    t5_tokens: int
    images_seen: int
    resolution: int = 0
    encoders: tuple[str, ...] = ENCODERS
    format: str = "diffusers"
    bits: float = 16.0
    passed: bool | None = None
    parents: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    fewstep: str = __version__


def weights_hash(folder: Path, pattern: str = "*.safetensors") -> str:
    """sha256 over all files of a model folder that fit the pattern, by relative name and content."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while chunk := file.read(HASHED_AT_ONCE):
                digest.update(chunk)
    return digest.hexdigest()


def write(folder: Path, record: Artifact, save_model: Callable[[Path], Any]) -> Artifact:
    """Write a model folder and its record so that it appears whole or not at all.

    Args:
        folder: target; an artefact already there is replaced.
        record: what it is; its `weights` are filled in here.
        save_model: writes the diffusers folder.

    Raises:
        OSError: when the disk is full or the folder cannot be written; `folder` is then as it was.
    """
    with whole_folder(folder) as partial:
        save_model(partial)
        whole = replace(record, weights=weights_hash(partial, "*" if record.kind == "export" else "*.safetensors"))
        (partial / RECORD).write_text(json.dumps(asdict(whole), indent=1) + "\n")
    return whole


def mark(folder: Path, passed: bool, metrics: dict[str, float]) -> Artifact:
    """Write the verdict of a gate into a record, with the figures that it rests on."""
    marked = replace(read(folder), passed=passed, metrics=metrics)
    partial = folder / (RECORD + ".partial")
    partial.write_text(json.dumps(asdict(marked), indent=1) + "\n")
    partial.replace(folder / RECORD)
    return marked


def exists(folder: Path) -> bool:
    """Whether a whole artefact lies there."""
    return (folder / RECORD).is_file()


def read(folder: Path, kind: Kind | None = None) -> Artifact:
    """Read the record of a model folder, strictly.

    Raises:
        ValueError: no artefact, unknown or missing keys, or not of the wanted kind (names the stage that makes it).
    """
    path = folder / RECORD
    if not folder.is_dir():
        maker = f"stage `{MAKER[kind]}` makes it" if kind else "give a folder that `fewstep run` wrote"
        maker += ", or `fewstep adopt` of a model of your own" if kind == "teacher" else ""
        raise ValueError(f"{folder} does not exist; {maker}")
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a fewstep artefact: {RECORD} is missing. `fewstep run` writes one; `fewstep adopt {folder} "
            "--out DIR` makes a teacher of a diffusers folder"
        )
    try:
        raw = json.loads(path.read_text())
        lists = {name: tuple(raw[name]) for name in ("grid", "encoders") if name == "grid" or name in raw}
        record = Artifact(**{**raw, **lists})
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error}); make it again with its stage") from error
    if record.kind not in get_args(Kind):
        raise ValueError(f"{path}: kind {record.kind!r} is not one of {', '.join(get_args(Kind))}")
    if kind is not None and record.kind != kind:
        raise ValueError(
            f"{folder} holds a {record.kind}, a {kind} is needed here; stage `{MAKER[kind]}` makes one: "
            f"fewstep run RECIPE --stage {MAKER[kind]}"
        )
    return record
