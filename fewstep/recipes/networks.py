"""What networks say of a whole set of images: scores by prompt, variety, and distances from real images or another arm's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.engine.log import Progress
from fewstep.evaluate import coco, image_sets, scores
from fewstep.evaluate.benchmark import Benchmark
from fewstep.evaluate.image_sets import ImageSet, picture
from fewstep.evaluate.statistics import Estimate

Prepare = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
CHUNK = 32  # images that a network is given at once


def metric(name: str, images: ImageSet, reference: Path | None, weights: str | None = None) -> dict[str, dict[str, Any]]:
    """A metric of `evaluate.adapters`: a score of every image, or what the features of a network say of the whole set.

    Args:
        name: of the metric.
        images: a whole set.
        reference: folder of real images, or a set of images of the same prompts.
        weights: of its network; those in the usual places by default.

    Returns:
        By name. Of features: "NAME variety", how much the seeds of a prompt differ, if there are several; and with a reference
        the distances from it, called NAME if they are from real images and "NAME to ARM" if from another arm's.

    Raises:
        ValueError: an unknown name, a missing library or network, or neither a reference nor several seeds.
    """
    from fewstep.evaluate import adapters
    from fewstep.evaluate.adapters import clip

    asked = images.benchmark
    if name in adapters.SCORES:
        evaluator = adapters.describe(name, weights)
        texts = [asked.entries[p].text for p, _ in asked.images]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", clip.Cut)  # each chunk's own; said once below
            parts = list(_chunks(name, images, lambda pixels, at: adapters.score(name, pixels, texts[at], weights)))
        for w in (w for w in caught if not isinstance(w.message, clip.Cut)):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        said = clip.together([w.message for w in caught if isinstance(w.message, clip.Cut)], len(set(texts)))
        values = np.concatenate(parts).reshape(-1, asked.seeds)
        return {name: scores.single(name, "score", values, asked.categories, evaluator, warnings=said)}
    if name not in adapters.FEATURES:
        known = ", ".join([*adapters.SCORES, *adapters.FEATURES])
        raise ValueError(f"there is no metric {name} (known: {known})")
    if reference is None and asked.seeds < 2:
        raise ValueError(f"{name} compares with other images: give real ones or another arm's set with --reference, "
                         "or draw two seeds or more of each prompt, for their variety")
    read, about = partial(adapters.features, name, weights=weights), adapters.describe(name, weights)
    other = None if reference is None else _other(reference, asked)
    files = [] if reference is None or other else coco.reference_files(reference, asked)
    prepare = _preparation(asked)
    own = _features(name, images, read, prepare)
    out = {} if asked.seeds < 2 else {f"{name} variety": varied(f"{name} variety", own, images, about)}
    if other is not None:
        title = f"{name} to {other.name}"
        out[title] = from_arm(title, name, own, images, _features(title, other, read, prepare), other, about)
    elif files:
        true = _of_files(name, files, read, prepare)
        out[name] = from_real(name, own, images, true, {**about, "real images": scores.files_hash(files)})
    return out


def varied(title: str, own: Tensor, images: ImageSet, about: Mapping[str, str]) -> dict[str, Any]:
    """How much the seeds of one prompt differ, by features (N, D): Vendi score and mean distance, means over prompts."""
    from fewstep.evaluate import statistics, variety

    asked, groups = images.benchmark, scores.groupings(images.benchmark.categories)[0]
    split, figures = own.unflatten(0, (-1, asked.seeds)), dict[str, float]()
    for measure, values in (("vendi", variety.vendi(split)), ("mean distance", variety.mean_distance(split))):
        found = statistics.bootstrap(values[:, None], groups, draws=scores.draws_of(len(values)))
        figures |= _spread(measure, found[scores.headline(asked.categories)])
    evaluator = {**about, "protocol preprocessing": asked.preprocessing}
    return scores.whole(title, figures | {"seeds": float(asked.seeds)}, evaluator)


def from_real(title: str, own: Tensor, images: ImageSet, true: Tensor, about: Mapping[str, str]) -> dict[str, Any]:
    """Distances from real images; where each is that of a caption, it counts as an image of that prompt."""
    asked = images.benchmark
    how = coco.preparation(asked)
    matched = how is not None and how.reference == "matched"
    others: list[int | str] = [p for p in range(len(true))] if matched else [f"real {i}" for i in range(len(true))]
    figures, said = distances(own, true, ([p for p, _ in asked.images], others), title)
    evaluator = {**about, "protocol preprocessing": asked.preprocessing}
    return {**scores.whole(title, figures | {"real images": float(len(true))}, evaluator), "warnings": said}


def from_arm(
    title: str, name: str, own: Tensor, images: ImageSet, its: Tensor, other: ImageSet, about: Mapping[str, str]
) -> dict[str, Any]:
    """Distances from another arm's images of the same prompts, and the variety of seeds over its."""
    from fewstep.evaluate import variety

    asked, theirs = images.benchmark, other.benchmark
    figures, said = distances(own, its, ([p for p, _ in asked.images], [p for p, _ in theirs.images]), name)
    if asked.seeds == theirs.seeds > 1:
        groups = scores.groupings(asked.categories)[0]
        mine, theirs_ = (x.unflatten(0, (-1, asked.seeds)) for x in (own, its))
        found = variety.varieties(mine, theirs_, groups, draws=scores.draws_of(len(groups)))
        figures |= _spread("vendi ratio", found[scores.headline(asked.categories)].ratio)
    evaluator = {**about, "protocol preprocessing": asked.preprocessing, "reference": scores.images_hash(other.folder, theirs)}
    return {**scores.whole(title, figures, evaluator), "warnings": said}


def distances(
    own: Tensor, true: Tensor, groups: tuple[Sequence[int | str], Sequence[int | str]], name: str
) -> tuple[dict[str, float], list[str]]:
    """All distances of features (N, D) from those of a reference (M, D), by name, and what is to be said with them.

    Fréchet distance, KID with its interval (of CLIP's features CMMD, too), and of more than five images each precision, recall,
    density and coverage.
    """
    from fewstep.evaluate import manifold, metrics

    far = metrics.frechet(own, true)
    figures = {"frechet": far.value, **_spread("kid", metrics.kid(own, true, groups)), "images": float(len(own))}
    if name == "clip":
        figures |= _spread("cmmd", metrics.cmmd(own, true, groups))
    if min(len(own), len(true)) > manifold.NEIGHBOURS:
        figures |= manifold.precision_recall(true, own)._asdict() | manifold.density_coverage(true, own)._asdict()
    return figures, list(far.warnings)


def _preparation(asked: Benchmark) -> Prepare:
    """COCO's protocols crop and resize both sides as they say; others leave that to the network's own preparation."""
    how = coco.preparation(asked)
    return (lambda image: coco.prepare(image, how)) if how else (lambda image: image)


def _other(reference: Path, asked: Benchmark) -> ImageSet | None:
    """A reference that is a set of images; None if it is a folder of real ones.

    Raises:
        ValueError: a set of other prompts.
    """
    if not (reference / image_sets.BENCHMARK).is_file():
        return None
    found = image_sets.read(reference)
    if [e.text for e in found.benchmark.entries] != [e.text for e in asked.entries]:
        raise ValueError(f"{reference} answers other prompts ({found.benchmark.name}) than {asked.name}: "
                         "a distance from it would be one of prompts")
    return found


def _features(title: str, images: ImageSet, read: Any, prepare: Prepare) -> Tensor:
    return torch.cat(list(_chunks(title, images, lambda pixels, _: read([prepare(p) for p in pixels]))))


def _of_files(name: str, files: Sequence[Path], read: Any, prepare: Prepare) -> Tensor:
    real: list[Tensor] = []
    progress = Progress(f"{name} of real images", len(files))
    for begin in range(0, len(files), CHUNK):
        part = files[begin : begin + CHUNK]
        real.append(read([prepare(np.asarray(picture(path, "delete it or mend it"))) for path in part]))
        progress.show(begin + len(part))
    progress.close()
    return torch.cat(real)


def _chunks(
    title: str, images: ImageSet, read: Callable[[list[NDArray[np.uint8]], slice], Any]
) -> Iterator[Any]:
    """What `read` says of the images of a set, a few at a time, in the protocol's order."""
    every = images.benchmark.images
    progress = Progress(title, len(every))
    for begin in range(0, len(every), CHUNK):
        at = slice(begin, min(begin + CHUNK, len(every)))
        yield read([images.image(*image) for image in every[at]], at)
        progress.show(at.stop)
    progress.close()


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name} lo": estimate.lo, f"{name} hi": estimate.hi}
