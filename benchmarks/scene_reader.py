"""Read a scene from an image, and judge it against its caption.

The images of :mod:`sdmodule.data.toy.scenes` are flat colours inside known outlines, so image analysis reads them:
the border gives the background, patches of another palette colour give the objects, and the outline that overlaps a
patch best gives its shape, centre and radius. Without a network, the reader cannot share a model's mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, optimize

from sdmodule.data.toy.scenes import COLOURS, IMAGE_SIZE, PLACES, RELATIONS, SHAPES, SIZES, Scene, SceneObject, render
from sdmodule.errors import SettingsError

MIN_AREA = 25
"""Fewest pixels of an object; the smallest object, a small star, has 60, and anything below is a speck."""

MIN_CORE = 4
"""Fewest pixels of a patch of one colour without its rim, where colours blend."""

MIN_OVERLAP = 0.7
"""Least overlap (intersection over union) with an outline at which a patch has a shape at all."""

UNCLEAR = "unclear"
"""Shape of a patch that overlaps no outline enough."""

SIZE_LIMITS = {
    "small": (SIZES["small"][1] + sum(SIZES[None]) / 2) / 2,
    "large": (SIZES["large"][0] + sum(SIZES[None]) / 2) / 2,
}
"""Radius limit of a named size: halfway between its range and the middle of the unnamed range (11.25, 14.75)."""

PLACE_LIMIT = (4.0 + 10.0) / 2
"""Smallest offset of a named place: halfway between the largest unnamed offset (4) and the smallest named one (10)."""

ATTRIBUTES = ("background", "count", "colour", "shape", "size", "place", "relation", "all")
"""What :func:`judge` may report, in order."""

_NAMES = list(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=float)
_SQUARE = np.ones((3, 3), dtype=bool)

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Reading:
    """What an image shows.

    Attributes:
        background: name of the background's colour.
        objects: the objects, largest patch first; a shape may be :data:`UNCLEAR`.
    """

    background: str
    objects: tuple[SceneObject, ...]


def read_scene(image: Image.Image) -> Reading:
    """Read the background and the objects of an image.

    Where two colours meet, the blend may pass near a third (red to yellow passes orange). A colour therefore counts as
    present only where a patch of it survives the loss of its rim; every pixel is then given to the nearest of the
    colours that are present, which halves each edge where the outline runs.

    Args:
        image: image of 64x64 pixels.

    Returns:
        The background's colour, and colour, shape, centre and radius (pixels) of each object.

    Raises:
        SettingsError: the image has another size.
    """
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise SettingsError(
            f"The image has {image.width}x{image.height} pixels; scenes are read at {IMAGE_SIZE}x{IMAGE_SIZE}."
        )
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    nearest = _nearest(pixels, _PALETTE)
    rim = np.ones(nearest.shape, dtype=bool)
    rim[1:-1, 1:-1] = False
    background = int(np.bincount(nearest[rim]).argmax())

    cores = {k: _core(nearest == k) for k in range(len(_NAMES)) if k != background}
    cores = {k: core for k, core in cores.items() if core.any()}
    ground = np.median(pixels[rim & (nearest == background)], axis=0)
    inks = [np.median(pixels[core], axis=0) for core in cores.values()]
    owner = _nearest(pixels, np.stack([ground, *inks]))

    found = []
    for number, ((colour, core), ink) in enumerate(zip(cores.items(), inks, strict=True), start=1):
        for patch in _patches(owner == number):
            if patch.sum() >= MIN_AREA and (patch & core).any():
                # The share of ink in each pixel: 1 inside, 0 outside, between them on the antialiased edge.
                share = np.clip((pixels - ground) @ (ink - ground) / ((ink - ground) ** 2).sum(), 0, 1)
                edge = ndimage.binary_dilation(patch, _SQUARE) & ((owner == 0) | patch)
                found.append((int(patch.sum()), SceneObject(_NAMES[colour], *_fit(share * edge))))
    found.sort(key=lambda item: -item[0])
    return Reading(_NAMES[background], tuple(item for _, item in found))


def judge(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Judge which words of a scene's caption an image follows.

    Only what the caption states is counted: size and place if it names them, and the relation of two objects. A missing
    object makes every word about it wrong. With surplus objects the largest are judged, and the count is wrong. Two
    objects are matched to the caption's in the order that agrees with most of its words.

    Args:
        scene: the scene whose caption was the prompt.
        reading: what :func:`read_scene` made of the image.

    Returns:
        Right or wrong for each stated one of :data:`ATTRIBUTES`; ``all`` is whether every one is right.
    """
    wanted = len(scene.objects)
    verdict = {"background": reading.background == scene.background, "count": len(reading.objects) == wanted}
    seen = (*reading.objects, *[None] * wanted)[:wanted]
    orders = [_judge_objects(scene, order) for order in permutations(seen)]
    best = max(orders, key=lambda order: sum(order.values()))
    verdict |= best
    return verdict | {"all": all(verdict.values())}


def _judge_objects(scene: Scene, seen: tuple[SceneObject | None, ...]) -> dict[str, bool]:
    """Judge the objects of an image in the order of the caption's; None where one is missing."""
    objects = [item for item in seen if item is not None]
    complete = len(objects) == len(scene.objects)
    pairs = list(zip(scene.objects, objects, strict=False))
    verdict = {
        "colour": complete and all(said.colour == shown.colour for said, shown in pairs),
        "shape": complete and all(said.shape == shown.shape for said, shown in pairs),
    }
    if scene.size is not None:
        limit, sign = SIZE_LIMITS[scene.size], 1 if scene.size == "large" else -1
        verdict["size"] = complete and sign * (objects[0].radius - limit) > 0
    if scene.place is not None:
        dx, dy = PLACES[scene.place]
        middle = IMAGE_SIZE / 2
        verdict["place"] = complete and dx * (objects[0].x - middle) + dy * (objects[0].y - middle) > PLACE_LIMIT
    if scene.relation is not None:
        dx, dy = RELATIONS[scene.relation]
        verdict["relation"] = complete and _lies(objects[0], objects[1], dx, dy)
    return verdict


def _lies(first: SceneObject, second: SceneObject, dx: float, dy: float) -> bool:
    """Whether the first object lies in a direction from the second, more along that axis than across it."""
    x, y = first.x - second.x, first.y - second.y
    return dx * x + dy * y > abs(dy * x) + abs(dx * y)


def _nearest(pixels: Array, colours: Array) -> NDArray[np.intp]:
    """Index of the nearest colour ``[n, 3]`` to each pixel ``[h, w, 3]``, as ``[h, w]``."""
    return ((pixels[:, :, None] - colours) ** 2).sum(-1).argmin(-1)


def _patches(mask: Mask) -> list[Mask]:
    labels, count = ndimage.label(mask)
    return [labels == k for k in range(1, count + 1)]


def _core(mask: Mask) -> Mask:
    """A mask without its rim and specks."""
    patches = [patch for patch in _patches(ndimage.binary_erosion(mask, _SQUARE)) if patch.sum() >= MIN_CORE]
    return np.logical_or.reduce(patches) if patches else np.zeros_like(mask)


def _cover(shape: str, x: float, y: float, radius: float) -> Array:
    """Share of each pixel that a shape covers, drawn by the renderer of the scenes."""
    image = render(Scene("black", (SceneObject("white", shape, x, y, radius),)))
    black, white = COLOURS["black"][0], COLOURS["white"][0]
    return (np.asarray(image, dtype=float)[:, :, 0] - black) / (white - black)


def _moments(cover: Array) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a cover, in pixels."""
    y, x = ndimage.center_of_mass(cover)
    return float(cover.sum()), float(x) + 0.5, float(y) + 0.5


@cache
def _unit_moments(shape: str, radius: float = 20.0) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1 around the origin."""
    area, x, y = _moments(_cover(shape, IMAGE_SIZE / 2, IMAGE_SIZE / 2, radius))
    return area / radius**2, (x - IMAGE_SIZE / 2) / radius, (y - IMAGE_SIZE / 2) / radius


def _fit(cover: Array) -> tuple[str, float, float, float]:
    """Shape, centre and radius of the outline that overlaps a cover best.

    Each shape starts with the area and centroid of the cover; the best three are then refined.
    """
    area, x, y = _moments(cover)

    def miss(place: Array, shape: str) -> float:
        drawn = _cover(shape, *place)
        return 1.0 - float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())

    def start(shape: str) -> Array:
        unit_area, unit_x, unit_y = _unit_moments(shape)
        radius = np.sqrt(area / unit_area)
        return np.array([x - radius * unit_x, y - radius * unit_y, radius])

    fits = []
    for shape in sorted(SHAPES, key=lambda shape: miss(start(shape), shape))[:3]:
        options = {"initial_simplex": start(shape) + np.vstack([np.zeros(3), 0.6 * np.eye(3)]), "maxfev": 30}
        best = optimize.minimize(miss, start(shape), args=(shape,), method="Nelder-Mead", options=options)
        fits.append((float(best.fun), shape, *best.x.tolist()))
    lost, shape, x, y, radius = min(fits)
    return shape if 1.0 - lost >= MIN_OVERLAP else UNCLEAR, x, y, radius
