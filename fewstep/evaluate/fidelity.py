"""How far images are from those that they should equal: same prompts, same noise, another arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAP = 100.0  # dB of images that agree in every pixel


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image (N, H, W, 3) in dB, at most `CAP`.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise ValueError(f"images {found.shape} are compared with images {expected.shape}")
    square = np.square(found.astype(np.float64) - expected.astype(np.float64)).mean(axis=(1, 2, 3))
    return np.minimum(CAP, 20 * np.log10(255) - 10 * np.log10(np.maximum(square, 1e-12)))


def summary(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> Mapping[str, Any]:
    """Of images (N, H, W, 3): PSNR of all pixels, its median and 5th percentile over images, largest difference (0 to 255).

    A student can be of two minds about an object: few images that turn out otherwise set the first figure, most images
    the second.
    """
    each = psnr(found, expected)
    square = float(np.square(found.astype(np.float64) - expected.astype(np.float64)).mean())
    return {
        "psnr": min(CAP, float(20 * np.log10(255) - 10 * np.log10(max(square, 1e-12)))),
        "psnr_median": float(np.median(each)),
        "psnr_p5": float(np.percentile(each, 5)),
        "largest": int(np.abs(found.astype(np.int16) - expected.astype(np.int16)).max()),
        "images": len(each),
    }
