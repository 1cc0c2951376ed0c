"""Draw a scene: supersampled coverage masks from closed-form geometry, blended in sRGB."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fewstep.worlds.shapes.scene import BACKGROUND_RGB, CANVAS, RGB, Object, Scene, Shape

SUPERSAMPLE = 4  # samples per pixel and axis


def inside(shape: Shape, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie in the canonical shape of nominal radius 1 centred at 0 (v down). Boxes reach at most 1.1."""
    if shape == "circle":
        return u**2 + v**2 <= 1.0
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.86
    if shape == "triangle":  # upright, apex at v = -1, base at v = 0.9
        return (v <= 0.9) & (np.abs(u) <= (v + 1.0) * 0.56)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return (np.minimum(a, b) <= 0.34) & (np.maximum(a, b) <= 1.0)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(obj: Object) -> tuple[NDArray[np.float64], slice, slice]:
    """Share of each pixel that the object covers, on its bounding window: (mask (h, w) in [0, 1], rows, columns)."""
    reach = 1.1 * obj.radius + 1
    x_lo, x_hi = max(0, int(obj.x - reach)), min(CANVAS, int(obj.x + reach) + 1)
    y_lo, y_hi = max(0, int(obj.y - reach)), min(CANVAS, int(obj.y + reach) + 1)
    offsets = (np.arange(SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    u = ((np.arange(x_lo, x_hi)[:, None] + offsets).ravel() - obj.x) / obj.radius
    v = ((np.arange(y_lo, y_hi)[:, None] + offsets).ravel() - obj.y) / obj.radius
    hit = inside(obj.shape, u[None, :], v[:, None])
    mask = hit.reshape(y_hi - y_lo, SUPERSAMPLE, x_hi - x_lo, SUPERSAMPLE).mean(axis=(1, 3))
    return mask, slice(y_lo, y_hi), slice(x_lo, x_hi)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw the scene as an sRGB image (64, 64, 3), uint8. A pure function of the scene."""
    image = np.empty((CANVAS, CANVAS, 3))
    image[:] = BACKGROUND_RGB
    for obj in scene.objects:
        mask, rows, columns = coverage(obj)
        window = image[rows, columns]
        window += mask[..., None] * (np.asarray(RGB[obj.color], dtype=np.float64) - window)
    return np.rint(image).astype(np.uint8)
