"""How different the seeds of one prompt look, by features of any network: what is lost first when a few-step model collapses.

vendi: effective number of different images, from 1 (all the same) to the number of seeds (Friedman and Dieng 2023).
mean_distance: mean distance of two seeds.

Both are means over prompts, with intervals over prompts, and are compared with a reference arm, such as the teacher, on the
same prompts and as many seeds: 0.8 of the teacher's variety means something, 2.3 effective images mean nothing. Features
that tell nothing apart call everything the same: on the toy world `diversity` reads what is drawn instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.evaluate import statistics
from fewstep.evaluate.metrics import directions, double
from fewstep.evaluate.statistics import DRAWS, LEVEL, OVERALL, Estimate
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

Float = NDArray[np.float64]


class Variety(NamedTuple):
    """A measure of variety, a reference's, and the ratio of the two, each with its interval over prompts."""

    value: Estimate
    reference: Estimate
    ratio: Estimate


def vendi(features: Tensor) -> Float:
    """Vendi score of each prompt, with the cosine as similarity.

    Args:
        features: (P, S, D): prompts, seeds, features.

    Returns:
        (P,), 1 to S.

    Raises:
        ValueError: another shape, fewer than two seeds, or features that are not finite or of length 0.
    """
    ways = _directions(features)
    return vendi_of_kernel(ways @ ways.transpose(1, 2))


def vendi_of_kernel(kernel: Tensor) -> Float:
    """Vendi score of each similarity matrix: the exponential of the entropy of the eigenvalues of kernel / S.

    Args:
        kernel: (P, S, S), symmetric and positive semi-definite, 1 on the diagonal.

    Returns:
        (P,), 1 to S.

    Raises:
        ValueError: not such matrices.
    """
    if kernel.ndim != 3 or kernel.shape[1] != kernel.shape[2] or 0 in kernel.shape:
        raise ValueError(f"a kernel must be (prompts, seeds, seeds), not {tuple(kernel.shape)}")
    wide = double(kernel)
    ones = wide.diagonal(dim1=1, dim2=2) - 1
    if not bool(torch.isfinite(wide).all()) or float(ones.abs().max()) > 1e-6:
        raise ValueError("a kernel must be finite and 1 on its diagonal: an image is as similar to itself as can be")
    if float((wide - wide.transpose(1, 2)).abs().max()) > 1e-6:
        raise ValueError("a kernel must be symmetric")
    values = torch.linalg.eigvalsh(wide / wide.shape[1])
    if float(values.min()) < -1e-6:
        raise ValueError(f"a kernel must be positive semi-definite: it has the eigenvalue {float(values.min()):.3g}")
    found: Float = torch.special.entr(values.clamp(min=0)).sum(dim=1).exp().cpu().numpy()
    return found


def mean_distance(features: Tensor, cosine: bool = True) -> Float:
    """Mean distance of two different seeds, of each prompt; unbiased for any number of seeds.

    Args:
        features: (P, S, D).
        cosine: 1 - cosine, 0 to 2, or else the Euclidean distance.

    Returns:
        (P,).

    Raises:
        ValueError: as `vendi`; length 0 matters for the cosine alone.
    """
    if cosine:
        # half the squared distance of directions is 1 - cosine, without losing small ones to rounding
        apart = _pairs(_directions(features)).square() / 2
    else:
        apart = _pairs(double(_checked(features)))
    seeds = features.shape[1]
    found: Float = (apart.sum(dim=(1, 2)) / (seeds * (seeds - 1))).cpu().numpy()
    return found


def varieties(
    features: Tensor,
    reference: Tensor,
    tasks: Sequence[str],
    measure: Callable[[Tensor], Float] = vendi,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Variety]:
    """A measure of an arm beside that of a reference, on the same prompts and as many seeds; tasks as in `statistics`.

    Args:
        features, reference: (P, S, D) of the two arms, prompts in one order.
        tasks: the task of each prompt.
        measure: (P, S, D) to (P,), such as `vendi` or `mean_distance`.
        draws, seed, level: as in `statistics.bootstrap`.

    Raises:
        ValueError: arms of other shapes, a reference without variety, and as `measure` and `statistics.bootstrap`.
    """
    if features.shape[:2] != reference.shape[:2]:
        shapes = f"{tuple(features.shape[:2])} and {tuple(reference.shape[:2])}"
        raise ValueError(f"variety depends on the number of seeds: arms need the same prompts and seeds, not {shapes}")
    own, other = measure(features), measure(reference)
    ratios = ratio(own, other, tasks, draws, seed, level)
    values, references = (statistics.bootstrap(v[:, None], tasks, draws, seed, level) for v in (own, other))
    return {name: Variety(values[name], references[name], ratios[name]) for name in ratios}


def ratio(
    values: ArrayLike, reference: ArrayLike, tasks: Sequence[str], draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> dict[str, Estimate]:
    """Mean of an arm over mean of a reference, with the interval of prompts resampled for both together.

    Args:
        values, reference: (P,), prompts in one order.
        tasks, draws, seed, level: as in `statistics.bootstrap`.

    Returns:
        One ratio of means a task, and "overall", the ratio of the means of the six GenEval tasks, if all six are there.

    Raises:
        ValueError: not aligned, not finite, or a reference that is not positive.
    """
    shapes = {np.shape(values), np.shape(reference), (len(tasks),)}
    if len(shapes) > 1 or not tasks:
        raise ValueError(f"a ratio needs one number and task a prompt from each arm, not those of shapes {sorted(shapes)}")
    sides = np.array([values, reference], dtype=np.float64)
    if not np.isfinite(sides).all() or (sides[1] < 0).any():
        raise ValueError("measures of variety must be finite, and those of the reference not negative")
    drawn: dict[str, Float] = {}  # (1 + draws, 2): the two means, first of the prompts themselves
    for stream, name in enumerate(dict.fromkeys(tasks)):
        own = sides[:, np.array([t == name for t in tasks])].T
        times = np.vstack([np.ones(len(own)), statistics.resampling(len(own), draws, seed, stream)])
        drawn[name] = times @ own / len(own)
    if set(GENEVAL_TASKS) <= set(drawn):
        drawn[OVERALL] = np.mean([drawn[t] for t in GENEVAL_TASKS], axis=0)
    out: dict[str, Estimate] = {}
    for name, means in drawn.items():
        if means[:, 1].min() <= 0:
            raise ValueError(f"{name}: the reference shows no variety in too many prompts, so there is no ratio to it")
        found = means[:, 0] / means[:, 1]
        out[name] = Estimate(float(found[0]), *statistics.percentiles(found[1:], level))
    return out


def _pairs(x: Tensor) -> Tensor:
    """Distances (P, S, S) within each prompt, from differences, so that equal images are at distance 0."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _directions(features: Tensor) -> Tensor:
    return directions(_checked(features).flatten(0, 1), "features").unflatten(0, features.shape[:2])


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 3 or 0 in features.shape or features.shape[1] < 2:
        raise ValueError(f"features must be (prompts, seeds, features) with two seeds or more, not {tuple(features.shape)}")
    if not features.is_floating_point() or not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite numbers in floating point")
    return features
