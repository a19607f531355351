"""Fit the outline of a shape to a patch of an image, and decide whether the patch has that outline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from sdmodule.data.toy.scenes import IMAGE_SIZE, SHAPES, SceneObject, coverage

CANDIDATES = 3
"""Shapes that are fitted: those whose outline overlaps a patch best at the patch's own area and centroid."""

RAYS = 120
"""Directions in which an outline is compared: every 3 degrees, so that the points of a star lie on rays."""

STEP = 0.25
"""Distance of the samples along a ray, in pixels."""

REACH = 4.0
"""Pixels on either side of an outline in which it is compared; what lies further inside or outside is no outline."""

MIN_OVERLAP = 0.85
"""Least overlap (intersection over union) with the rendered shape at which a patch has that shape."""

MAX_DEPARTURE = {"circle": (0.25, 0.02), "other": (0.6, 0.03)}
"""Most that an outline may depart from the rendered shape in any direction: pixels, and pixels per pixel of radius.

A circle, which has no points that an autoencoder could soften, shows its corners as half a pixel.
"""

BLUR = 0.6
"""Standard deviation, in pixels, of a blur that is no error."""

NOISE = 0.1
"""Share of a patch's colour in a pixel, or lack of it, that is taken for noise."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outline:
    """The rendered shape that overlaps a patch best.

    Attributes:
        shape: name of the shape.
        x: centre in pixels.
        y: centre in pixels.
        radius: in pixels.
        overlap: intersection over union of the shape and the patch, 0 to 1.
    """

    shape: str
    x: float
    y: float
    radius: float
    overlap: float


def draw(shape: str, x: float, y: float, radius: float) -> Array:
    """Share of each pixel that a shape covers, ``[h, w]``, drawn by the renderer of the scenes."""
    return np.asarray(coverage(SceneObject("white", shape, x, y, radius)), dtype=float) / 255


def sharpen(share: Array) -> Array:
    """A share of each pixel without the noise around 0 and 1, and with a steeper edge between them."""
    return np.clip((share - NOISE) / (1 - 2 * NOISE), 0, 1)


def fit_outline(cover: Array) -> Outline:
    """The outline that overlaps a patch best.

    Args:
        cover: share of the patch in each pixel, 0 to 1, ``[h, w]``.
    """
    area, x, y = _moments(cover)

    def miss(place: Array, shape: str) -> float:
        drawn = sharpen(draw(shape, *place))
        return 1.0 - float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())

    def start(shape: str) -> Array:
        unit_area, unit_x, unit_y = _unit_moments(shape)
        radius = np.sqrt(area / unit_area)
        return np.array([x - radius * unit_x, y - radius * unit_y, radius])

    def refine(place: Array, shape: str, spread: float, trials: int) -> tuple[float, Array]:
        options = {"initial_simplex": place + np.vstack([np.zeros(3), spread * np.eye(3)]), "maxfev": trials}
        best = optimize.minimize(miss, place, args=(shape,), method="Nelder-Mead", options=options)
        return float(best.fun), best.x

    likely = sorted(SHAPES, key=lambda shape: miss(start(shape), shape))[:CANDIDATES]
    fits = {shape: refine(start(shape), shape, 0.6, 24) for shape in likely}
    shape = min(fits, key=lambda shape: fits[shape][0])
    lost, place = refine(fits[shape][1], shape, 0.3, 40)
    return Outline(shape, *place.tolist(), overlap=1.0 - lost)


def has_outline(cover: Array, outline: Outline) -> bool:
    """Whether a patch overlaps an outline enough, and departs from it in no direction further than a slight blur would.

    Along each ray from the centre, within `REACH` of the outline, the patch and the rendered shape are summed: the
    difference is how far the patch reaches beyond the outline, in pixels. A blur of `BLUR` pixels leaves that sum as it
    is along a straight edge, shortens points and fills notches. What lies between the two sums is no error, and beyond
    them `MAX_DEPARTURE` is allowed.

    Args:
        cover: share of the patch in each pixel, 0 to 1, ``[h, w]``.
        outline: the fitted outline.
    """
    if outline.overlap < MIN_OVERLAP:
        return False
    drawn = draw(outline.shape, outline.x, outline.y, outline.radius)
    sharp, blurred, seen = _radial_sums((sharpen(drawn), sharpen(ndimage.gaussian_filter(drawn, BLUR)), cover), outline)
    beyond = np.maximum(seen - np.maximum(sharp, blurred), np.minimum(sharp, blurred) - seen)
    fixed, per_radius = MAX_DEPARTURE["circle" if outline.shape == "circle" else "other"]
    return bool(beyond.max() <= fixed + per_radius * outline.radius)


def _radial_sums(images: Sequence[Array], outline: Outline) -> Array:
    """Sums of images along rays from an outline's centre, near the outline of the first, ``[images, RAYS]`` pixels."""
    angles = 2 * np.pi * np.arange(RAYS) / RAYS
    along = np.arange(0.0, 1.1 * outline.radius + REACH, STEP)
    x = outline.x - 0.5 + np.outer(np.cos(angles), along)
    y = outline.y - 0.5 + np.outer(np.sin(angles), along)
    rays = np.stack([ndimage.map_coordinates(image, [y, x], order=1, mode="constant") for image in images])
    edge = rays[0].sum(axis=1, keepdims=True) * STEP
    return (rays * (np.abs(along - edge) <= REACH)).sum(axis=2) * STEP


def _moments(cover: Array) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a cover, in pixels."""
    y, x = ndimage.center_of_mass(cover)
    return float(cover.sum()), float(x) + 0.5, float(y) + 0.5


@cache
def _unit_moments(shape: str, radius: float = 20.0) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1 around the origin."""
    area, x, y = _moments(draw(shape, IMAGE_SIZE / 2, IMAGE_SIZE / 2, radius))
    return area / radius**2, (x - IMAGE_SIZE / 2) / radius, (y - IMAGE_SIZE / 2) / radius
