"""Edges of an image (Canny 1986, "A Computational Approach to Edge Detection"), as ControlNets are trained on them.

The result is that of OpenCV's ``Canny(image, 100, 200)``, to the pixel: Sobel gradients of three by three pixels, the
sum of their absolute values as strength, and no blur before.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

LOW, HIGH = 100, 200
"""Strengths that an edge may fall to, and that it must reach somewhere (those of Zhang et al. 2023)."""

TANGENT = 13573
"""The tangent of 22.5 degrees in units of 2**-15, which tells level and upright edges from slanted ones."""


def canny_edges(image: Image.Image) -> Image.Image:
    """White edges on black, RGB, of the size of the image."""
    across, down, strength = _gradients(np.asarray(image.convert("RGB")))
    thin = _is_ridge(across, down, strength) & (strength > LOW)
    connected, _ = ndimage.label(thin, structure=np.ones((3, 3)))
    strong = np.unique(connected[thin & (strength > HIGH)])
    edges = np.isin(connected, strong[strong > 0])
    return Image.fromarray(np.where(edges, 255, 0).astype(np.uint8)).convert("RGB")


def _gradients(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients across and down and their strength ``[H, W]``, at each pixel of the channel that is strongest there."""
    values = np.pad(pixels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth_down = values[:-2] + 2 * values[1:-1] + values[2:]
    smooth_across = values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]
    across = smooth_down[:, 2:] - smooth_down[:, :-2]
    down = smooth_across[2:] - smooth_across[:-2]
    strongest = (np.abs(across) + np.abs(down)).argmax(axis=-1)[..., None]
    across, down = (np.take_along_axis(each, strongest, axis=-1)[..., 0] for each in (across, down))
    return across, down, np.abs(across) + np.abs(down)


def _is_ridge(across: np.ndarray, down: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Whether a pixel is the strongest across its edge: of two that are equal, the first."""
    around = np.pad(strength, 1)
    height, width = strength.shape

    def neighbour(dy: int, dx: int) -> np.ndarray:
        return around[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    rise, run = np.abs(down).astype(np.int64) << 15, np.abs(across).astype(np.int64)
    level = rise < run * TANGENT
    upright = rise > run * TANGENT + (run << 16)
    falling = (across < 0) == (down < 0)
    slanted = np.where(
        falling,
        (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1)),
        (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1)),
    )
    beside = (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1))
    stacked = (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0))
    return np.where(level, beside, np.where(upright, stacked, slanted))
