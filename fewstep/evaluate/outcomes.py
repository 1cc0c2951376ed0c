"""What came of one arm of an evaluation, on disk: `<arm>.json` with the verdicts, `<arm>.safetensors` with the images.

Both files appear by a rename, the verdicts last. Both name the protocol and the fingerprint of the arm, so files
of different runs are never taken for a pair.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = 1


class Result(TypedDict):
    """One image. `facts` are [shape, colour, size, cell] of each object; the ceiling has them of the `truth` too."""

    prompt: int
    seed: int
    text: str
    task: str
    strict: bool
    geneval: bool
    unknown: int
    reason: str
    description: str
    facts: list[list[Any]]
    truth: NotRequired[list[list[Any]]]


class Outcome(TypedDict):
    """One arm. `results` are in the protocol's order, like the images; seconds hold sampling and decoding."""

    format: int
    name: str
    fingerprint: str
    protocol: str
    grid: list[float]
    guidance_scale: float
    nfe: int
    seconds_per_image: float
    results: list[Result]


def write(folder: Path, outcome: Outcome, images: NDArray[np.uint8]) -> None:
    """Store an arm; until the last rename an older outcome of that name, or none, is what `read` finds.

    Args:
        folder: made if missing.
        outcome: verdicts.
        images: (N, H, W, 3), aligned with `outcome["results"]`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels, verdicts = _paths(folder, outcome["name"])
    partial = pixels.with_name(pixels.name + ".partial")
    save_file({"images": np.ascontiguousarray(images)}, partial, metadata=_identity(outcome))
    os.replace(partial, pixels)
    partial = verdicts.with_name(verdicts.name + ".partial")
    partial.write_text(json.dumps(outcome))
    os.replace(partial, verdicts)


def read(folder: Path, name: str, protocol: str, fingerprint: str) -> Outcome | None:
    """The stored outcome of an arm, or None where there is none whole of this protocol and fingerprint."""
    pixels, verdicts = _paths(folder, name)
    if not (pixels.exists() and verdicts.exists()):
        return None
    try:
        outcome: Outcome = json.loads(verdicts.read_text())
        with safe_open(pixels, "numpy") as file:
            metadata = file.metadata()
    except (json.JSONDecodeError, SafetensorError):
        return None
    wanted = {"protocol": protocol, "fingerprint": fingerprint}
    same = outcome.get("format") == FORMAT and _identity(outcome) == wanted == metadata
    return outcome if same else None


def read_images(folder: Path, name: str) -> NDArray[np.uint8]:
    """The images of an arm, (N, H, W, 3).

    Raises:
        FileNotFoundError: the arm was not evaluated here.
    """
    with safe_open(_paths(folder, name)[0], "numpy") as file:
        images: NDArray[np.uint8] = file.get_tensor("images")
    return images


def verdicts(outcome: Outcome, scoring: str) -> NDArray[np.bool_]:
    """Verdicts (prompts, seeds) of one scoring, "strict" or "geneval"."""
    results = outcome["results"]
    seeds = 1 + max(r["seed"] for r in results)
    right = [bool(r[scoring]) for r in results]  # type: ignore[literal-required]
    return np.array(right, dtype=np.bool_).reshape(-1, seeds)


def tasks(outcome: Outcome) -> list[str]:
    """The task of every prompt, in order."""
    return [r["task"] for r in outcome["results"] if r["seed"] == 0]


def _identity(outcome: Mapping[str, Any]) -> dict[str, str]:
    return {"protocol": outcome["protocol"], "fingerprint": outcome["fingerprint"]}


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.safetensors", folder / f"{name}.json"
