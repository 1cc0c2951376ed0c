"""Neural metrics behind thin adapters: weights are the user's, numbers are checked, and a metric that fails prints none.

`score` and `features` first let a metric test itself (`selftest`), once in a process for the same weights. Whoever uses a
metric names it with `describe`, which carries the hash of its weights.

Not here, because they cannot or may not live in one environment with us: GenEval's detector, ImageReward, HPSv3, GenEval 2
(`evaluate.sidecar`). Not at all: what may not be used freely, such as aesthetic predictor v2.5 (AGPL).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.engine.doctor import Finding
from fewstep.evaluate.adapters import clip, dinov2, inception, selftests
from fewstep.evaluate.adapters.parts import Adapter, Found, Measure, Pixels, weights_hash

_ALL = (*clip.ADAPTERS, *dinov2.ADAPTERS, *inception.ADAPTERS)
SCORES: dict[str, Adapter] = {a.name: a for a in _ALL if a.kind != "features"}
FEATURES: dict[str, Adapter] = {a.name: a for a in _ALL if a.kind == "features"}


class _Opened(NamedTuple):
    measure: Measure
    findings: tuple[Finding, ...]


def score(
    name: str, images: Sequence[Pixels], prompts: Sequence[str] = (), weights: Path | str | None = None
) -> NDArray[np.float64]:
    """The score of each image, (N,).

    Args:
        name: of `SCORES`.
        images: (H, W, 3), uint8, of any sizes.
        prompts: what each image was asked to show; scores that read the image alone need none.
        weights: folder, file or hub id; see `describe`.

    Raises:
        ValueError: an unknown name, bad images, weights that are not there, or a self-test that failed.
    """
    adapter = _named(name, SCORES)
    _checked(name, images)
    if adapter.kind == "pair" and len(prompts) != len(images):
        raise ValueError(f"{name} reads an image with its prompt: {len(images)} images and {len(prompts)} prompts were given")
    found: NDArray[np.float64] = _trusted(adapter, weights)(images, prompts).double().numpy()
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: image {int(np.argmin(np.isfinite(found)))} has no finite score; its weights are damaged")
    return found


def features(name: str, images: Sequence[Pixels], weights: Path | str | None = None) -> Tensor:
    """Features (N, D) float32 of images (H, W, 3), uint8, of any sizes.

    Raises:
        ValueError: see `score`.
    """
    adapter = _named(name, FEATURES)
    _checked(name, images)
    return _trusted(adapter, weights)(images, ()).float()


def describe(name: str, weights: Path | str | None = None) -> dict[str, str]:
    """What a protocol says of a metric: its adapter's version, scale, preprocessing, and the sha256 of its weights.

    Versions of libraries are not among it: the self-test holds them to the same numbers.

    Args:
        name: of `SCORES` or `FEATURES`.
        weights: a folder in transformers' format, a safetensors file, or the id of a repository in the hub's cache; by
            default what lies in `parts.home()`/NAME, else the usual repository in the hub's cache. Nothing is downloaded.

    Raises:
        ValueError: unknown, or its weights are not there; says how to get them, and their licence.
    """
    adapter = _named(name, SCORES | FEATURES)
    found = adapter.find(weights)
    return {"metric": name, "version": adapter.version, **adapter.about, "weights": weights_hash(found.files)}


def selftest(name: str, weights: Path | str | None = None) -> list[Finding]:
    """What the self-test of a metric finds: "FAIL" for what is wrong, "note" where weights or a library are absent.

    Raises:
        ValueError: an unknown name.
    """
    adapter = _named(name, SCORES | FEATURES)
    try:
        found = adapter.find(weights)
    except ValueError as error:
        said = "no weights" if weights is None else "weights as named are not there"
        return [*selftests.offline(adapter), Finding("note" if weights is None else "FAIL", name, said, str(error))]
    try:
        return list(_open(name, found, weights_hash(found.files)).findings)
    except (ValueError, OSError, RuntimeError) as error:
        absent = bool(adapter.needs) and find_spec(adapter.needs) is None
        said = " ".join(str(error).split())[:400]
        return [*selftests.offline(adapter), Finding("note" if absent else "FAIL", name, "cannot be opened", said)]


def _named(name: str, among: dict[str, Adapter]) -> Adapter:
    if name not in among:
        raise ValueError(f"there is no metric {name!r}: give one of {', '.join(among)}")
    return among[name]


def _checked(name: str, images: Sequence[Pixels]) -> None:
    if not images:
        raise ValueError(f"{name}: no images")
    for number, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"{name}: image {number} is {image.dtype} {image.shape}; images are uint8 (height, width, 3)")


def _trusted(adapter: Adapter, weights: Path | str | None) -> Measure:
    found = adapter.find(weights)
    opened = _open(adapter.name, found, weights_hash(found.files))
    wrong = [f for f in opened.findings if f.state == "FAIL"]
    if wrong:
        said = "; ".join(f"{f.found} ({f.fix})" for f in wrong)
        raise ValueError(f"{adapter.name} failed its self-test, so it prints no score: {said}. See `fewstep doctor --eval`")
    return opened.measure


@lru_cache(maxsize=2)  # a network stays in memory while it is used; ViT-H is 4 GB
def _open(name: str, found: Found, hashed: str) -> _Opened:
    adapter = (SCORES | FEATURES)[name]
    before = tuple(selftests.offline(adapter))
    measure = adapter.load(found)
    return _Opened(measure, (*before, *selftests.with_weights(adapter, measure)))
