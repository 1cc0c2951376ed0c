"""What every adapter of a neural metric is made of: where its weights lie, what it says of itself, and pixels as it wants them.

Weights are never fetched: they lie in a folder or file that is named, in `home()`/NAME, or in the hub's cache. Only
safetensors are read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Pixels = NDArray[np.uint8]
Measure = Callable[[Sequence[Pixels], Sequence[str]], Tensor]
"""Images (H, W, 3) and as many prompts, or none for features -> scores (N,) float64 or features (N, D) float32."""

BATCH = 32
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
READ_AT_ONCE = 2**24
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al. 2021
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Source(NamedTuple):
    """Where somebody else publishes weights.

    Attributes:
        hub: hub id.
        files: that are needed.
        licence: of the weights, in a few words.
    """

    hub: str
    files: tuple[str, ...]
    licence: str

    @property
    def fetch(self) -> str:
        """The command that a user may type; we never do."""
        return f"hf download {self.hub} {' '.join(self.files)}"


class Found(NamedTuple):
    """Weights on this disk.

    Attributes:
        model: folder or file of the network.
        tokenizer: folder of the tokenizer, for networks that read.
        head: file of what comes on top of the network.
    """

    model: Path
    tokenizer: Path | None = None
    head: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All safetensors files that decide what comes out."""
        single = self.model / "model.safetensors" if self.model.is_dir() else self.model
        own = [single] if single.is_file() else sorted(self.model.glob("model-*.safetensors"))
        return (*own, self.head) if self.head else tuple(own)


@dataclass(frozen=True)
class Adapter:
    """A neural metric.

    Attributes:
        name: as users write it.
        kind: what comes out; a "pair" score reads prompt and image, an "image" score the image alone.
        about: "scale" and "preprocessing" in words, for the protocol.
        version: of this adapter's own rules: raised when its numbers change.
        licence: of the weights that it is usually used with, and where they come from.
        find: weights on this disk, from what a user named or from the usual places; ValueError says how to get them.
        load: the measure, from such weights.
        tiny: the same measure with a tiny network whose weights are a formula; None where a library is needed for it.
    """

    name: str
    kind: Literal["pair", "image", "features"]
    about: Mapping[str, str]
    licence: str
    find: Callable[[Path | str | None], Found]
    load: Callable[[Found], Measure]
    tiny: Callable[[], Measure] | None
    version: str = "1"
    needs: str = field(default="")


def home() -> Path:
    """Where weights that no hub holds as safetensors are kept: FEWSTEP_METRICS, or the cache folder of the user."""
    named = os.environ.get("FEWSTEP_METRICS")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "metrics"


def device() -> torch.device:
    """Where networks of metrics run: the first GPU, or the CPU; always in float32."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def snapshot(source: Source, what: str) -> Path:
    """The folder of the hub's cache that holds a source's files. Nothing is fetched.

    Raises:
        ValueError: a file is missing; says the command that fetches it, and the licence.
    """
    from huggingface_hub import try_to_load_from_cache

    held = [try_to_load_from_cache(source.hub, name) for name in source.files]
    missing = [name for name, path in zip(source.files, held, strict=True) if not isinstance(path, str)]
    if missing:
        raise ValueError(
            f"{what} needs {missing[0]} of {source.hub}, which fewstep does not fetch by itself: {source.fetch}  (licence: "
            f"{source.licence}); or name a folder that holds it"
        )
    return Path(str(held[0])).parent


def model_folder(source: Source, named: Path | str | None, what: str) -> Path:
    """The folder of a network in transformers' format.

    Args:
        source: whose weights are meant where nothing is named.
        named: a folder, or the id of a repository in the hub's cache.
        what: the metric's name.

    Raises:
        ValueError: it is not there, or has no safetensors.
    """
    local = home() / what
    if named is None and not local.is_dir():
        return snapshot(source, what)
    if named is not None and not Path(named).exists() and HUB_ID.fullmatch(str(named)):
        return snapshot(Source(str(named), source.files, "see its page"), what)
    folder = local if named is None else Path(named)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what}: {folder} is no folder of a network (config.json is missing). Usually: {source.fetch}")
    if not (folder / "model.safetensors").is_file() and not list(folder.glob("model-*.safetensors")):
        raise ValueError(f"{what}: {folder} has no safetensors file; pickles are not read. examples/convert_pt.py converts one")
    return folder


def weights_file(named: Path | str | None, what: str, how: str) -> Path:
    """A single safetensors file.

    Args:
        named: the file; by default `home()`/NAME.safetensors.
        what: the metric's name.
        how: how to get it, for the error; "{path}" in it is where it belongs.

    Raises:
        ValueError: it is not there, or is another kind of file.
    """
    path = home() / f"{what}.safetensors" if named is None else Path(named)
    how = how.format(path=path.with_suffix(".safetensors"))
    if path.suffix != ".safetensors":
        raise ValueError(f"{what}: {path} is not a safetensors file; pickles are not read. {how}")
    if not path.is_file():
        raise ValueError(f"{what} needs {path}, which fewstep does not fetch by itself. {how}")
    return path


def weights_hash(files: Sequence[Path]) -> str:
    """sha256, in hexadecimal, over the contents of files, whatever their folder; remembered while they stay as they are."""
    return _hash(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=64)
def _hash(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with Path(path).open("rb") as file:
            while chunk := file.read(READ_AT_ONCE):
                digest.update(chunk)
    return digest.hexdigest()


def cropped(image: Pixels, short: int, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Shorter side to `short` by Pillow's bicubic filter, centre crop, normalised: (3, size, size) float32.

    As transformers' Pillow processors for CLIP (short = size) and DINOv2 (256, 224).
    """
    height, width = image.shape[:2]
    scale = short / min(height, width)
    to = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = Image.fromarray(image).resize(to, Image.Resampling.BICUBIC) if scale != 1 else Image.fromarray(image)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return _normalised(np.asarray(resized.crop((left, top, left + size, top + size))), mean, std)


def squared(image: Pixels, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The whole image squeezed to a square by Pillow's bicubic filter, normalised: (3, size, size) float32."""
    return _normalised(np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)), mean, std)


def barred(image: Pixels, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Longer side to `size` by a bicubic filter with antialiasing on floats, black bars, normalised: (3, size, size) float32.

    As HPSv2's own preprocessing under torchvision since 0.17; older ones left the antialiasing out.
    """
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    height, width = image.shape[:2]
    scale = size / max(height, width)
    if scale != 1:
        to = (round(height * scale), round(width * scale))
        pixels = torch.nn.functional.interpolate(pixels, size=to, mode="bicubic", align_corners=False, antialias=True)
    down, right = size - pixels.shape[2], size - pixels.shape[3]
    pixels = torch.nn.functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
    return (pixels[0] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _normalised(image: Pixels, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    pixels = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and convolutions of a GPU in float32, not in TF32, whose ten bits are another number."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def in_batches(images: Sequence[Pixels], prepare: Callable[[Pixels], Tensor], embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Network outputs (N, D) float32 on the CPU of images that are prepared one by one and embedded `BATCH` at a time."""
    found = []
    with exact():
        for start in range(0, len(images), BATCH):
            batch = torch.stack([prepare(image) for image in images[start : start + BATCH]])
            found.append(embed(batch.to(device())).float().cpu())
    return torch.cat(found)
