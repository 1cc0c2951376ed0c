"""Images of one arm on disk, in GenEval's layout, so that its tools and ours read the same folder.

    benchmark.json                what was asked
    sampling.json                 who answered, and how
    00012/metadata.jsonl          one line: the prompt and its facts
    00012/samples/0003.png        prompt 12, seed 3

Its own generator writes five digits (00003.png), which are read, too. Every image of ours appears by a rename. A set is whole
when no image is missing; a set that is not is never scored.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.engine import files
from fewstep.evaluate import benchmark as protocols
from fewstep.evaluate.benchmark import Benchmark

BENCHMARK, SAMPLING = "benchmark.json", "sampling.json"
NAMED = 5  # missing images that an error lists


class ImageSet(NamedTuple):
    """One arm's images.

    Attributes:
        folder: where they are.
        benchmark: what was asked.
        sampling: "name" of the arm, and as far as known "model" (hash of its weights), "grid", "guidance_scale", "nfe",
            "width", "height", "seconds_per_image".
    """

    folder: Path
    benchmark: Benchmark
    sampling: dict[str, Any]

    @property
    def name(self) -> str:
        """The arm's name."""
        return str(self.sampling["name"])

    def image(self, prompt: int, seed: int) -> NDArray[np.uint8]:
        """One image, (H, W, 3).

        Raises:
            ValueError: it is missing or damaged.
        """
        return np.asarray(picture(located(self.folder, prompt, seed), "delete it and draw it again"))


def file_name(prompt: int, seed: int) -> str:
    """Where an image of ours lies in its set."""
    return f"{prompt:05d}/samples/{seed:04d}.png"


def located(folder: Path, prompt: int, seed: int) -> Path:
    """An image's file in a set: ours, or the one that GenEval's generator wrote; ours where there is none."""
    own, theirs = folder / file_name(prompt, seed), folder / f"{prompt:05d}/samples/{seed:05d}.png"
    return theirs if theirs.is_file() and not own.is_file() else own


def picture(path: Path, advice: str) -> Image.Image:
    """A picture file, whoever made it, as RGB; the texts that it holds stay in `info`.

    Args:
        path: of the file.
        advice: what to do about one that cannot be read, for the error.

    Raises:
        ValueError: missing, damaged, or of more pixels than Pillow opens (a few bytes can claim any number).
    """
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): {advice}") from error


def begin(folder: Path, benchmark: Benchmark, sampling: Mapping[str, Any]) -> None:
    """Make or go on with a set.

    Args:
        folder: of the set.
        benchmark: what is asked.
        sampling: see `ImageSet`; "name" is needed.

    Raises:
        ValueError: the folder holds images of another benchmark or arm, or of nobody knows whom.
    """
    settled = {key: value for key, value in sampling.items() if key != "seconds_per_image"}
    if (folder / SAMPLING).is_file():
        held = told(folder)
        held.pop("seconds_per_image", None)
        if held != json.loads(json.dumps(settled)) or protocols.read(folder / BENCHMARK).hash != benchmark.hash:
            raise ValueError(f"{folder} holds images of another model, grid or protocol: give another folder, or delete it")
        return
    if missing(folder, benchmark) != [file_name(*image) for image in benchmark.images]:
        raise ValueError(f"{folder} holds images, and nothing says who drew them: give another folder, or score it as it is")
    protocols.write(folder / BENCHMARK, benchmark)
    files.write(folder / SAMPLING, json.dumps(dict(sampling), indent=1))


def put(folder: Path, benchmark: Benchmark, prompt: int, seed: int, image: NDArray[np.uint8]) -> None:
    """Store one image (H, W, 3)."""
    path = folder / file_name(prompt, seed)
    told = path.parent.parent / "metadata.jsonl"
    if not told.is_file():
        entry = benchmark.entries[prompt]
        line = {"prompt": entry.text, "tag": entry.category, **entry.facts}
        files.write(told, json.dumps(line) + "\n")
    with files.whole_file(path) as partial:
        Image.fromarray(image).save(partial, "PNG")


def finish(folder: Path, **figures: float) -> None:
    """Add figures of the drawing, such as seconds_per_image, to the arm's record."""
    files.write(folder / SAMPLING, json.dumps(told(folder) | figures, indent=1))


def told(folder: Path) -> dict[str, Any]:
    """A set's record of its arm.

    Raises:
        ValueError: missing or damaged.
    """
    path = folder / SAMPLING
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        _ = held["name"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): draw the set anew, in another folder") from None
    return dict(held)


def missing(folder: Path, benchmark: Benchmark) -> list[str]:
    """Names of images that are not there."""
    return [file_name(*image) for image in benchmark.images if not located(folder, *image).is_file()]


def read(folder: Path, benchmark: Benchmark | None = None) -> ImageSet:
    """A whole set.

    Args:
        folder: the set's; one that another tool made in GenEval's layout needs `benchmark`.
        benchmark: what it must answer; by default what it says of itself.

    Raises:
        ValueError: not a set, one of another benchmark or with other prompts, or incomplete; says which images are missing.
    """
    own = protocols.read(folder / BENCHMARK) if (folder / BENCHMARK).is_file() else None
    asked = benchmark or own
    if asked is None:
        raise ValueError(f"{folder} is no set of images: {BENCHMARK} is missing. Name the protocol that it answers")
    if own is not None and own.hash != asked.hash:
        raise ValueError(f"{folder} answers {own.name} ({own.hash[:12]}), not {asked.name} ({asked.hash[:12]})")
    if own is None:
        _same_prompts(folder, asked)
    absent = missing(folder, asked)
    if absent:
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        raise ValueError(
            f"{folder} lacks {len(absent)} of {len(asked.images)} images of {asked.name}: {', '.join(absent[:NAMED])}{more}. "
            "A score of some images is no score: draw the others"
        )
    sampling = told(folder) if (folder / SAMPLING).is_file() else {"name": folder.name}
    return ImageSet(folder, asked, sampling)


def _same_prompts(folder: Path, asked: Benchmark) -> None:
    """What another tool noted beside its images must be what is asked: a list in another order is scored without a word."""
    for number, entry in enumerate(asked.entries):
        path = folder / f"{number:05d}" / "metadata.jsonl"
        try:
            text = json.loads(path.read_text(encoding="utf-8"))["prompt"] if path.is_file() else entry.text
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): delete it, if the images are of the right prompts") from None
        if text != entry.text:
            raise ValueError(f"{path} says {str(text)[:80]!r}; prompt {number} of {asked.name} is {entry.text!r}")
