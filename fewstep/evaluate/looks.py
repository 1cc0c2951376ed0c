"""Images of one look at a student: prompts x seeds in one PNG, which says in itself what it shows.

Rows are prompts, columns are seeds. Every look of a run asks the same prompts from the same noise, so that sheets lie on each
other picture by picture; the teacher's from that noise is a sheet, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from fewstep.engine import files
from fewstep.evaluate.image_sets import picture

FOLDER = "browser"  # of a run's sheets, in its folder
ENDING, TEACHER = ".sheet.png", "teacher.sheet.png"
KEY = "fewstep"  # of the text chunk
AGAIN = "delete it, it is made again"
LARGE = 256  # pixels of a side, from which on fewer images are kept
MANY, FEW = (12, 4), (8, 2)  # prompts and seeds that are kept of small images, and of large ones


class Sheet(NamedTuple):
    """Images of P prompts with S seeds each.

    Attributes:
        images: (P, S, H, W, 3).
        texts: the P prompts.
        about: what else was told when it was written, such as the hash of the weights.
    """

    images: NDArray[np.uint8]
    texts: list[str]
    about: dict[str, Any]


def file_name(stage: str, images: int) -> str:
    """Of the sheet of a look at a stage after so many training images."""
    return f"{stage}-{images:07d}{ENDING}"


def kept(prompts: int, seeds: int, side: int) -> tuple[int, int]:
    """How many of the prompts and seeds that are looked at get into a sheet, for images with this side in pixels."""
    most = FEW if side > LARGE else MANY
    return min(prompts, most[0]), min(seeds, most[1])


def write(path: Path, images: NDArray[np.uint8], texts: Sequence[str], about: Mapping[str, Any] | None = None) -> None:
    """Store a sheet, whole or not at all.

    Args:
        path: of the PNG.
        images: (P, S, H, W, 3).
        texts: P prompts.
        about: more to be told, ready for JSON.

    Raises:
        ValueError: another shape, or not as many prompts as rows.
    """
    if images.ndim != 5 or images.shape[-1] != 3 or len(images) != len(texts):
        raise ValueError(f"a sheet needs images (prompts, seeds, H, W, 3) of {len(texts)} prompts, not {images.shape}")
    p, s, h, w, _ = images.shape
    told = PngImagePlugin.PngInfo()
    told.add_itxt(KEY, json.dumps({**(about or {}), "prompts": list(texts), "seeds": s}))
    flat = np.ascontiguousarray(images.transpose(0, 2, 1, 3, 4).reshape(p * h, s * w, 3))
    with files.whole_file(path) as partial:
        Image.fromarray(flat).save(partial, "PNG", pnginfo=told)


def read(path: Path) -> Sheet:
    """A sheet.

    Raises:
        ValueError: missing, damaged, or a picture that is no sheet.
    """
    opened = picture(path, AGAIN)
    try:
        told, flat = json.loads(str(opened.info[KEY])), np.asarray(opened)
        texts, s = [str(text) for text in told.pop("prompts")], int(told.pop("seeds"))
        h, w = flat.shape[0] // len(texts), flat.shape[1] // s
        images = flat.reshape(len(texts), h, s, w, 3).transpose(0, 2, 1, 3, 4)
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no sheet of images ({error}): {AGAIN}") from error
    return Sheet(np.ascontiguousarray(images), texts, told)
