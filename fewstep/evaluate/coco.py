"""Named protocols on COCO's captions: every choice that moves such a number is in the name or beside it.

Nine things must be fixed before two such numbers can be compared: which captions and how many, which real images, how real and
generated images are cropped and resized and with which filter, how they are stored, which network reads them and how it
resizes them to its input. Here generated images are PNG; real ones are decoded as they are, and both go the same way.

The crop to the middle square and LANCZOS to 256 pixels, and all real images as the reference, are those of GigaGAN's
evaluation, which DMD2 uses. The choice of captions is ours, because no two publications share one: see `choose`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.evaluate.benchmark import Benchmark, Entry

FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CHOICE = "coco captions 1"  # salt of the order of captions; another one is another protocol
IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Preparation:
    """How a COCO protocol treats images.

    Attributes:
        captions: how many are asked for, one image each.
        size: side that the middle square is resized to.
        filter: of that resizing, PIL's.
        features: network that reads the images (see `evaluate.adapters`), which does the last resizing itself.
        reference: "all" images of the folder of real ones, or those "matched" with the captions.
    """

    captions: int
    size: int
    filter: Literal["lanczos", "bicubic", "bilinear"]
    features: str
    reference: Literal["all", "matched"]


PROTOCOLS: dict[str, Preparation] = {
    "coco30k-gigagan256-lanczos-clean": Preparation(30_000, 256, "lanczos", "inception_clean", "all"),
    "coco30k-256-bicubic-clean": Preparation(30_000, 256, "bicubic", "inception_clean", "all"),
    "coco30k-256-lanczos-legacy": Preparation(30_000, 256, "lanczos", "inception_legacy", "all"),
    "coco5k-dinov2": Preparation(5_000, 256, "bicubic", "dinov2", "matched"),
}


def coco(name: str, captions: Path, count: int | None = None) -> Benchmark:
    """A COCO protocol.

    Args:
        name: one of `PROTOCOLS`.
        captions: the user's captions_val2014.json, or a .txt with exactly the captions to ask for, one a line.
        count: fewer captions, for a look; the name then says so.

    Raises:
        ValueError: an unknown name, an unreadable file, or too few captions.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"{name} is none of {', '.join(PROTOCOLS)}")
    wanted = PROTOCOLS[name].captions if count is None else count
    if wanted < 1:
        raise ValueError(f"captions must be at least 1, not {wanted}")
    entries = _listed(captions) if captions.suffix == ".txt" else choose(captions, wanted)
    if len(entries) < wanted:
        raise ValueError(f"{captions} has captions of {len(entries)} images, {name} asks for {wanted}")
    how = PROTOCOLS[name]
    return Benchmark(
        name=name if wanted == PROTOCOLS[name].captions else f"{name}-first{wanted}",
        entries=tuple(entries[:wanted]),
        seeds=1,
        evaluator=_evaluator(how),
        preprocessing=_preprocessing(how),
    )


def choose(captions: Path, count: int) -> list[Entry]:
    """Captions in a fixed order that depends on no library: by sha256 of "coco captions 1:ID", and of each image the first.

    A smaller number is the beginning of a larger one. White space in a caption is made single; empty ones are left out.

    Args:
        captions: captions_val2014.json: {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}.
        count: how many, at most one an image.

    Returns:
        Entries whose facts are the caption's and image's numbers and the image's file name.

    Raises:
        ValueError: not such a file.
    """
    try:
        record = json.loads(captions.read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in record["images"]}
        told = [(int(a["id"]), int(a["image_id"]), " ".join(str(a["caption"]).split())) for a in record["annotations"]]
    except OSError as error:
        raise ValueError(f"{captions} cannot be read ({error.strerror}): give COCO's captions_val2014.json") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{captions} is not COCO's file of captions: {error!r}") from None
    chosen: dict[int, Entry] = {}
    for number, image, text in sorted(told, key=lambda c: hashlib.sha256(f"{CHOICE}:{c[0]}".encode()).digest()):
        if len(chosen) == count:
            break
        if text and image not in chosen:
            if image not in files:
                raise ValueError(f"{captions}: caption {number} is of image {image}, which is not listed")
            chosen[image] = Entry(text, "", {"caption": number, "image": image, "file_name": files[image]})
    return list(chosen.values())


def prepare(image: NDArray[np.uint8], how: Preparation) -> NDArray[np.uint8]:
    """An image (H, W, 3), real or generated, as a protocol shows it to its network.

    Returns:
        (S, S, 3): the middle square, resized; as it is where it has that size.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(image).crop((left, top, left + side, top + side))
    if square.size != (how.size, how.size):
        square = square.resize((how.size, how.size), FILTERS[how.filter])
    return np.asarray(square)


def preparation(benchmark: Benchmark) -> Preparation | None:
    """The settings of a protocol of COCO, by what it says of itself; None for others, whatever they are called."""
    told = dict(benchmark.evaluator), benchmark.preprocessing
    return next((how for how in PROTOCOLS.values() if (_evaluator(how), _preprocessing(how)) == told), None)


def _evaluator(how: Preparation) -> dict[str, str]:
    return {"features": how.features, "reference": how.reference}


def _preprocessing(how: Preparation) -> str:
    return f"middle square, {how.filter} to {how.size}, png"


def reference_files(folder: Path, benchmark: Benchmark) -> list[Path]:
    """Real images that generated ones are compared with, in a fixed order.

    Args:
        folder: of real images, such as val2014.
        benchmark: of COCO, then as it says; of anything else all images.

    Raises:
        ValueError: no folder, no images, or a matched image that is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one with the real images as --reference")
    how = preparation(benchmark)
    if how is not None and how.reference == "matched":
        return [_matched(folder, entry.facts) for entry in benchmark.entries]
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(IMAGES)})")
    return files


def _matched(folder: Path, facts: Mapping[str, Any]) -> Path:
    if "file_name" not in facts:
        raise ValueError("captions from a .txt do not say which real images they are of: give captions_val2014.json")
    name = Path(str(facts["file_name"])).name  # a name of a file, never a way out of the folder
    if not (folder / name).is_file():
        raise ValueError(f"{folder} lacks {name}, the image of caption {facts['caption']}")
    return folder / name


def _listed(path: Path) -> list[Entry]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return [Entry(text.strip()) for text in lines if text.strip()]
