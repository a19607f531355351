"""Canny edges of an image (Canny 1986, "A Computational Approach to Edge Detection"), for ControlNets.

The result equals OpenCV's ``Canny(image, 100, 200)``, to the pixel: Sobel gradients of 3 x 3 pixels, the sum of their
absolute values as magnitude, and no blur.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

LOW, HIGH = 100, 200
"""Hysteresis thresholds of Zhang et al. 2023: all of an edge is above the low one, some of it above the high one."""

TANGENT = 13573
"""Tangent of 22.5 degrees in units of 2**-15; it separates horizontal and vertical gradients from diagonal ones."""


def canny_edges(image: Image.Image) -> Image.Image:
    """Edges of an image, white on black, in RGB and of the same size."""
    dx, dy, magnitude = _gradients(np.asarray(image.convert("RGB")))
    thin = _is_maximum(dx, dy, magnitude) & (magnitude > LOW)
    connected, _ = ndimage.label(thin, structure=np.ones((3, 3)))
    strong = np.unique(connected[thin & (magnitude > HIGH)])
    edges = np.isin(connected, strong[strong > 0])
    return Image.fromarray(np.where(edges, 255, 0).astype(np.uint8)).convert("RGB")


def _gradients(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients along x and y and their magnitude, each ``[H, W]``, of the channel that is strongest at each pixel."""
    values = np.pad(pixels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth_y = values[:-2] + 2 * values[1:-1] + values[2:]
    smooth_x = values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]
    dx = smooth_y[:, 2:] - smooth_y[:, :-2]
    dy = smooth_x[2:] - smooth_x[:-2]
    strongest = (np.abs(dx) + np.abs(dy)).argmax(axis=-1)[..., None]
    dx, dy = (np.take_along_axis(gradient, strongest, axis=-1)[..., 0] for gradient in (dx, dy))
    return dx, dy, np.abs(dx) + np.abs(dy)


def _is_maximum(dx: np.ndarray, dy: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Non-maximum suppression: whether a pixel is the strongest along its gradient; of two equal ones, the first."""
    padded = np.pad(magnitude, 1)
    height, width = magnitude.shape

    def neighbour(down: int, right: int) -> np.ndarray:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    rise, run = np.abs(dy).astype(np.int64) << 15, np.abs(dx).astype(np.int64)
    is_horizontal = rise < run * TANGENT
    is_vertical = rise > run * TANGENT + (run << 16)
    horizontal = (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1))
    vertical = (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0))
    diagonal = np.where(
        (dx < 0) == (dy < 0),
        (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1)),
        (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1)),
    )
    return np.where(is_horizontal, horizontal, np.where(is_vertical, vertical, diagonal))
