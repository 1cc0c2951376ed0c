"""What an image was made with, inside its PNG: our JSON, and the line that tools around A1111 read. Any file is read warily.

The chunk "fewstep" holds what is needed to draw the image again, and what may explain a difference: versions, type, device and
threads. It names no machine, person or path. Images of the server carry the API's own words, which are read as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from fewstep import __version__
from fewstep.serve.contract import MOST_STEPS, Ask, Contract, Made

if TYPE_CHECKING:
    import torch  # the server writes images without it

KEY, A1111, FORMAT = "fewstep", "parameters", 1
MOST_BYTES, MOST_JSON, MOST_PIXELS = 2**28, 2**16, 2**26
LIBRARIES = ("torch", "diffusers", "transformers")
NOISE = "splitmix64 of seed, index and step; PyTorch's CPU normals"


class Told(NamedTuple):
    """What an image file says of itself.

    Attributes:
        image: its pixels, (H, W, 3).
        ask: what was asked, every field filled.
        model: name of the model.
        weights: hash of its weights.
        grid: times visited.
        pixels: hash of the pixels that were drawn; empty where it is not told.
        environment: what it was made with, by name; empty where it is not told.
    """

    image: NDArray[np.uint8]
    ask: Ask
    model: str
    weights: str
    grid: tuple[float, ...]
    pixels: str
    environment: dict[str, str]


def environment(dtype: str, device: torch.device) -> dict[str, str]:
    """What the last bits of an image may depend on."""
    import torch

    found = {"fewstep": __version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in LIBRARIES}
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return {**found, "dtype": dtype, "device": device.type, "processor": processor, "threads": str(torch.get_num_threads())}


def record(made: Made, contract: Contract, around: Mapping[str, str]) -> dict[str, Any]:
    """What is written into an image."""
    return {
        "format": FORMAT,
        "ask": asdict(made.ask),
        "model": {"name": contract.name, "kind": contract.kind, "weights": contract.weights},
        "grid": list(made.grid),
        "nfe": made.nfe,
        "noise": {"seed": made.ask.seed, "index": made.ask.index, "step": 0, "made": NOISE},
        "warnings": list(made.warnings),
        "pixels": hash_of(made.image),
        "environment": dict(around),
    }


def a1111_line(told: Mapping[str, Any]) -> str:
    """An image of the API, by the API's words, as A1111 writes it."""
    same = _of_api(told)
    return _parameters(Ask(**same["ask"]), same["model"]["name"], same["model"]["weights"])


def _parameters(ask: Ask, model: str, weights: str) -> str:
    """Parameters as A1111 writes them; line ends of prompts become spaces, so that none passes for another field."""
    facts = {
        "Steps": ask.steps,
        "Sampler": "Euler",
        "CFG scale": f"{ask.guidance_scale:g}",
        "Seed": ask.seed,
        "Size": f"{ask.width}x{ask.height}",
        "Model hash": weights[:10],
        "Model": model,
        "Version": f"fewstep {__version__}",
    }
    negative = [f"Negative prompt: {_one_line(ask.negative_prompt)}"] if ask.negative_prompt else []
    return "\n".join([_one_line(ask.prompt), *negative, ", ".join(f"{key}: {value}" for key, value in facts.items())])


def write(path: Path, made: Made, contract: Contract, around: Mapping[str, str] | None) -> None:
    """Write an image, whole or not at all; without `around` it says nothing of itself.

    Raises:
        OSError: it cannot be written.
    """
    chunks = None
    if around is not None:
        line = _parameters(made.ask, contract.name, contract.weights)
        chunks = _chunks(record(made, contract, around), line)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    Image.fromarray(made.image).save(partial, "PNG", pnginfo=chunks)
    os.replace(partial, path)


def chunks_of_api(told: Mapping[str, Any]) -> PngInfo:
    """What is written into an image of the server: the API's own words."""
    return _chunks(told, a1111_line(told))


def _chunks(told: Mapping[str, Any], line: str) -> PngInfo:
    chunks = PngInfo()
    chunks.add_text(KEY, json.dumps(told))  # JSON in ASCII
    chunks.add_itxt(A1111, line)
    return chunks


def read(path: Path) -> Told:
    """An image and what it says of itself.

    Raises:
        ValueError: no PNG, one that says nothing, or one that says what cannot be.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} cannot be read: it is not a file")  # a pipe would be waited for
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB: no image of ours")
        with Image.open(path, formats=["PNG"]) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"it has {opened.width} x {opened.height} pixels, more than any image of ours")
            text = opened.info.get(KEY)
            image = np.asarray(opened.convert("RGB"))
    except OSError as error:
        why = error.strerror or ("not a PNG" if isinstance(error, UnidentifiedImageError) else str(error))
        raise ValueError(f"{path} cannot be read: {why}") from None
    except ValueError as error:  # ours, or Pillow's of chunks that are too long or too short
        raise ValueError(f"{path} cannot be read: {shown(str(error))[:200]}") from None
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged: {shown(str(error))[:200]}") from None
    if not isinstance(text, str):
        raise ValueError(
            f"{path} does not say how it was made: it is no image of `fewstep generate`, or was written with --no-metadata, "
            "or another program saved it again"
        )
    try:
        if len(text) > MOST_JSON:
            raise ValueError(f"{len(text):,} characters")
        told = json.loads(text)
        return _told(told, image) if "num_inference_steps" not in told else _told(_of_api(told), image)
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: what it says of itself is damaged or was changed ({shown(str(error))[:200]})") from None


def hash_of(image: NDArray[np.uint8]) -> str:
    """sha256, in hexadecimal, of an image's size and pixels."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def _told(told: Mapping[str, Any], image: NDArray[np.uint8]) -> Told:
    if told["format"] != FORMAT:
        raise ValueError(f"format {told['format']!r:.40}, only {FORMAT} is known")
    ask, grid, weights = Ask(**told["ask"]), tuple(told["grid"]), told["model"]["weights"]
    if not isinstance(weights, str) or not re.fullmatch(r"[0-9a-f]{64}(\+[0-9a-f]{64})?", weights):
        raise ValueError("the hash of its weights is none")
    if not 2 <= len(grid) <= MOST_STEPS + 1 or not all(isinstance(t, int | float) and 0 <= t <= 1 for t in grid):
        raise ValueError("its grid is none")
    if ask.steps != len(grid) - 1 or (ask.height, ask.width) != image.shape[:2]:
        raise ValueError("steps or size are not those of the image")
    around = told.get("environment", {})
    known = {shown(str(key))[:40]: shown(str(value))[:80] for key, value in around.items()}
    name = shown(str(told["model"]["name"]))[:80]
    return Told(image, ask, name, weights, tuple(map(float, grid)), str(told.get("pixels", "")), known)


def _of_api(told: Mapping[str, Any]) -> dict[str, Any]:
    """The API's words for the same; of the environment they tell the type alone."""
    width, height = map(int, str(told["size"]).split("x"))
    same = {name: told[name] for name in ("prompt", "negative_prompt", "seed", "index", "guidance_scale")}
    ask = {**same, "steps": told["num_inference_steps"], "width": width, "height": height}
    around = {"dtype": told["dtype"]} if "dtype" in told else {}  # images of 0.1 do not tell it
    model = {"name": told["model"], "weights": told["weights"]}
    return {"format": FORMAT, "ask": ask, "grid": told["grid"], "model": model, "environment": around}


def shown(text: str) -> str:
    """Anyone's words on a line of a terminal: nothing that steers it, and no characters that hide or reverse others."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _one_line(text: str) -> str:
    return " ".join(text.replace("\0", " ").split())  # NUL ends a text in a PNG
