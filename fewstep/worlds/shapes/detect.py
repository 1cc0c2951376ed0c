"""Read a scene back from an image, without learned weights: the same image always gives the same answer.

Foreground by coverage of a palette colour; connected components; colour by vote over the eroded core (OKLab);
shape by comparing coverage with the four shapes drawn at the component's own centre of mass and area, which
blur leaves alone. What is not explained that way counts as `unknown`. Ours; the thresholds were set on clean,
degraded and malformed renders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import ndtr

from fewstep.worlds.shapes.render import inside
from fewstep.worlds.shapes.scene import (
    BACKGROUND_RGB,
    CANVAS,
    COLORS,
    RADIUS,
    RGB,
    SHAPES,
    Color,
    Shape,
    Size,
)

DETECTOR_VERSION = 2  # enters every score's protocol: raise it when an answer can change

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]

SMOOTHING = 0.65  # pixels; averages pixel noise away, and the templates are smoothed alike
EXTRA_BLURS = (0.0, 0.7, 1.3)  # pixels; templates may be this much softer, as mildly blurred shapes are
COLOR_REACH = 0.10  # OKLab; a pixel farther from every palette colour has none (closest two colours: 0.17)
FADE = 0.85  # thin shapes lose this much colour to blur; a pixel so faded still counts for its colour
TINT_REACH = 0.12  # sRGB per channel; a background this close to the nominal one is balanced to it
STAIN = 0.085  # OKLab; visibly not background: half of the faintest colour's distance
SPECK = 8  # pixels; a stray mark below this (8 % of the smallest object's area) is forgiven
FAINT = 0.1  # coverage this close to none or all is taken as such in the IoU, so noise does not add up
MIN_IOU = 0.80
MIN_SHARE = 0.62  # on the way from any other shape (0) to the one named (1); 0.5 is as much one as the other
MIN_PURITY = 0.75  # share of the core that must have the object's colour
SIZE_SLACK = 1.34  # a radius this many times below the small one or above the large one belongs to no size
SIZE_SPLIT = (RADIUS["small"] + RADIUS["large"]) / 2
MIN_RADIUS = RADIUS["small"] / SIZE_SLACK
MAX_RADIUS = RADIUS["large"] * SIZE_SLACK
SAMPLES = 3  # per pixel and axis, in templates

# Area and centre of mass (v, down) of each shape of nominal radius 1, from the geometry in `render.inside`.
AREA: dict[Shape, float] = {
    "circle": np.pi,
    "square": 1.72**2,
    "triangle": 0.56 * 1.9**2,
    "cross": 4 * 0.68 - 0.68**2,
}
MASS_V: dict[Shape, float] = {"circle": 0.0, "square": 0.0, "triangle": 0.9 - 1.9 / 3, "cross": 0.0}


@dataclass(frozen=True)
class Found:
    """One object read from an image.

    `x`, `y`, `radius` are pixels as in `scene.Object`; `confidence` is the soft IoU with the shape named.
    """

    shape: Shape
    color: Color
    size: Size
    x: float
    y: float
    radius: float
    confidence: float


@dataclass(frozen=True)
class Detection:
    """What an image shows: objects from left to right, and how many marks no object explains."""

    objects: tuple[Found, ...]
    unknown: int


def detect(image: NDArray[np.uint8]) -> Detection:
    """Read the objects of one image.

    Args:
        image: sRGB (64, 64, 3), uint8.

    Returns:
        Objects sorted by x, then y, and the number of unexplained marks.

    Raises:
        ValueError: if the image has another shape or type.
    """
    if image.shape != (CANVAS, CANVAS, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 ({CANVAS}, {CANVAS}, 3), not {image.dtype} {image.shape}")
    smooth = ndimage.gaussian_filter(image / 255.0, (SMOOTHING, SMOOTHING, 0), mode="nearest", truncate=3.0)
    rgb = _balance(smooth)
    lab = oklab(rgb)
    stain = np.sqrt(((lab - oklab(_background())) ** 2).sum(axis=2)) > STAIN
    parts = [part for mask in _components(_foreground(rgb)) for part in _split_colors(mask, lab)]
    owner = _owner(parts)
    found: list[Found] = []
    unknown = 0
    for index, part in enumerate(parts):
        objects = _read(part, owner == index, rgb, lab)
        found += objects
        unknown += not objects
    if parts:
        stain &= ~ndimage.binary_dilation(np.any(parts, axis=0), iterations=3)
    unknown += len(_components(stain))
    return Detection(tuple(sorted(found, key=lambda o: (o.x, o.y))), unknown)


def oklab(rgb: Float) -> Float:
    """sRGB (..., 3) in [0, 1] to OKLab (..., 3), where Euclidean distance follows perceived difference.

    Source: B. Ottosson, "A perceptual color space for image processing" (2020).
    """
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0.0) + 0.055) / 1.055) ** 2.4)
    lab: Float = np.cbrt(linear @ _TO_LMS) @ _TO_LAB
    return lab


_TO_LMS = np.array(
    [
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ]
)


@cache
def _background() -> Float:
    return np.array(BACKGROUND_RGB) / 255.0


@cache
def _axes() -> Float:
    """From the background to each colour, sRGB (8, 3): pixels of edges lie on these lines."""
    return np.array([RGB[c] for c in COLORS]) / 255.0 - _background()


@cache
def _shades() -> Float:
    """OKLab (16, 3) of the eight colours, pure and then faded."""
    return oklab(np.concatenate([_background() + _axes(), _background() + FADE * _axes()]))


def _balance(rgb: Float) -> Float:
    """White balance: scale the channels so that the background gets its nominal colour."""
    plain = np.abs(rgb - _background()).max(axis=2) < TINT_REACH
    if plain.mean() < 0.2:
        return rgb
    return np.clip(rgb * (_background() / np.median(rgb[plain], axis=0)), 0.0, 1.0)


def _foreground(rgb: Float) -> Mask:
    """Where the colour whose blend with the background fits best covers more than half."""
    along = (rgb - _background()) @ _axes().T
    square = (_axes() ** 2).sum(axis=1)
    half = (along > square / 2).any(axis=2)  # only these can be foreground
    along = along[half]
    share = np.clip(along / square, 0.0, 1.0)
    misfit = share * (share * square - 2 * along)  # squared distance to the blend, up to a constant per pixel
    best = misfit.argmin(axis=1)[:, None]
    half[half] = np.take_along_axis(share, best, 1)[:, 0] > 0.5
    return half


def _components(mask: Mask) -> list[Mask]:
    """8-connected components of at least `SPECK` pixels."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == i for i in range(1, count + 1) if sizes[i] >= SPECK]


def _nearest(lab: Float, candidates: Index) -> tuple[Index, Float]:
    """Nearest of the candidate colours for pixels (n, 3): positions in `candidates`, and distances."""
    shades = _shades()[np.concatenate([candidates, candidates + len(COLORS)])]
    square = (lab**2).sum(axis=1)[:, None] - 2 * lab @ shades.T + (shades**2).sum(axis=1)
    return square.argmin(axis=1) % len(candidates), np.sqrt(np.maximum(square.min(axis=1), 0.0))


def _votes(part: Mask, lab: Float) -> Index:
    """Votes of the core's pixels for each colour (8,), and for none at the end (9,)."""
    core = ndimage.binary_erosion(part)
    color, distance = _nearest(lab[core if core.any() else part], np.arange(len(COLORS)))
    return np.bincount(np.where(distance < COLOR_REACH, color, len(COLORS)), minlength=len(COLORS) + 1)


def _split_colors(mask: Mask, lab: Float) -> list[Mask]:
    """Cut a component where objects of different colours touch: a fifth of the votes makes a part."""
    votes = _votes(mask, lab)
    major = np.flatnonzero(votes[:-1] >= max(SPECK, 0.2 * votes.sum()))
    if len(major) < 2:
        return [mask]
    nearest = np.full(mask.shape, -1)
    nearest[mask] = _nearest(lab[mask], major)[0]
    return [part for i in range(len(major)) for part in _components(nearest == i)]


def _owner(parts: list[Mask]) -> Index:
    """Index of the part nearest to each pixel (64, 64); -1 everywhere if there are none."""
    index = np.full((CANVAS, CANVAS), -1)
    for i, part in enumerate(parts):
        index[part] = i
    if len(parts) < 2:
        return np.full_like(index, len(parts) - 1)
    rows, columns = ndimage.distance_transform_edt(index < 0, return_distances=False, return_indices=True)
    return index[rows, columns]


def _read(part: Mask, owned: Mask, rgb: Float, lab: Float) -> list[Found]:
    """The object that a part shows; several if thin bridges join them; none if it stays unexplained."""
    whole = _fit(part, owned, rgb, lab)
    if whole is not None:
        return [whole]
    pieces = _components(ndimage.binary_erosion(part))
    if len(pieces) < 2:
        return []
    owner = _owner(pieces)
    fits = [_fit(part & (owner == i), owned & (owner == i), rgb, lab) for i in range(len(pieces))]
    objects = [f for f in fits if f is not None]
    return objects if len(objects) == len(pieces) else []


def _fit(part: Mask, owned: Mask, rgb: Float, lab: Float) -> Found | None:
    """The colour and the shape that explain a part, if any do."""
    votes = _votes(part, lab)
    color = int(votes[:-1].argmax())
    if votes[color] < MIN_PURITY * votes.sum():
        return None
    rows, columns = _window(part)
    axis = _axes()[color]
    alpha = np.where(owned[rows, columns], (rgb[rows, columns] - _background()) @ (axis / (axis @ axis)), 0.0)
    v, u = np.mgrid[rows, columns] + 0.5
    mass = float(alpha.sum())
    x, y = float((alpha * u).sum()) / mass, float((alpha * v).sum()) / mass
    radii = [float(np.sqrt(mass / AREA[s])) for s in SHAPES]
    centres = [y - MASS_V[s] * r for s, r in zip(SHAPES, radii, strict=True)]
    drawn = [_hits(s, u[0] - x, v[:, 0] - c, r) for s, c, r in zip(SHAPES, centres, radii, strict=True)]
    best, iou, share = _compare(np.clip(alpha, 0.0, 1.0), np.stack(drawn))
    radius = radii[best]
    if iou < MIN_IOU or share < MIN_SHARE or not MIN_RADIUS <= radius <= MAX_RADIUS:
        return None
    size: Size = "large" if radius > SIZE_SPLIT else "small"
    return Found(SHAPES[best], COLORS[color], size, x, centres[best], radius, iou)


def _window(part: Mask) -> tuple[slice, slice]:
    """The part's bounding box with room for its soft edge: (rows, columns)."""
    rows, columns = ndimage.find_objects(part.astype(np.int8))[0]
    room = 4
    return (
        slice(max(0, rows.start - room), min(CANVAS, rows.stop + room)),
        slice(max(0, columns.start - room), min(CANVAS, columns.stop + room)),
    )


def _hits(shape: Shape, u: Float, v: Float, radius: float) -> Float:
    """Which sample points of a window lie in a shape (3h, 3w); `u` (w,), `v` (h,): pixels from its centre."""
    offsets = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
    u, v = ((a[:, None] + offsets).ravel() / radius for a in (u, v))
    return inside(shape, u[None, :], v[:, None]).astype(np.float64)


@cache
def _pixels(size: int, blur: float) -> Float:
    """Sample points to blurred pixels on one axis (size, 3 size): a pixel's box convolved with a Gaussian."""
    at = (np.arange(SAMPLES * size) + 0.5) / SAMPLES - (np.arange(size)[:, None] + 0.5)
    weights: Float = (ndtr((at + 0.5) / blur) - ndtr((at - 0.5) / blur)) / SAMPLES
    return weights


def _firm(coverage: Float) -> Float:
    return np.clip((coverage - FAINT) / (1 - 2 * FAINT), 0.0, 1.0)


def _compare(alpha: Float, hits: Float) -> tuple[int, float, float]:
    """The shape nearest to a coverage mask (h, w) among sampled shapes (4, 3h, 3w), at the best blur.

    Returns:
        Its index; its soft IoU; and how far the mask lies on the way to it from any other shape, 1 being all.
    """
    best, best_iou, best_soft = 0, -1.0, hits
    for extra in EXTRA_BLURS:
        blur = float(np.hypot(SMOOTHING, extra))
        soft = _pixels(alpha.shape[0], blur) @ hits @ _pixels(alpha.shape[1], blur).T
        seen, drawn = _firm(alpha), _firm(soft)
        overlap = np.minimum(seen, drawn).sum(axis=(1, 2))
        iou = overlap / (seen.sum() + drawn.sum(axis=(1, 2)) - overlap)
        if iou.max() > best_iou:
            best, best_iou, best_soft = int(iou.argmax()), float(iou.max()), soft
    shares = []
    for other in range(len(hits)):
        way = best_soft[best] - best_soft[other]
        if other != best:
            shares.append(float(((alpha - best_soft[other]) * way).sum() / (way**2).sum()))
    return best, best_iou, min(shares)
