"""Read a scene from an image, strictly, and judge it against its caption.

The images of :mod:`sdmodule.data.toy.scenes` are flat colours inside known outlines, so image analysis reads them:
the border gives the background, patches of another palette colour give the objects, and the outline that overlaps a
patch best gives its shape, centre and radius. A colour that is none of the palette's, an outline that departs from
the rendered shape, and anything that the scene read does not explain are errors. Without a network, the reader cannot
share a model's mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks.scene_outlines import fit_outline, has_outline, sharpen
from sdmodule.data.toy.scenes import COLOURS, IMAGE_SIZE, PLACES, RELATIONS, SIZES, Scene, SceneObject
from sdmodule.errors import SettingsError

MIN_AREA = 25
"""Fewest pixels of an object; the smallest object, a small star, has 60, and anything below is a speck."""

MIN_CORE = 4
"""Fewest pixels of a patch of one colour without its rim, where colours blend."""

MAX_COLOUR_DISTANCE = 35.0
"""Largest Euclidean distance, in RGB of 0 to 255, from a colour of the palette; the closest two there are 77 apart."""

MAX_STRAY = 40.0
"""Largest Euclidean distance, in RGB of 0 to 255, of a pixel from the scene that was read."""

MIN_SPECK = 4
"""Fewest neighbouring pixels beyond :data:`MAX_STRAY` that are a speck."""

UNCLEAR = "unclear"
"""Colour that is none of the palette's, and shape of a patch that has the outline of none."""

SIZE_LIMITS = {
    "small": (SIZES["small"][1] + sum(SIZES[None]) / 2) / 2,
    "large": (SIZES["large"][0] + sum(SIZES[None]) / 2) / 2,
}
"""Radius limit of a named size: halfway between its range and the middle of the unnamed range (11.25, 14.75)."""

PLACE_LIMIT = (4.0 + 10.0) / 2
"""Smallest offset of a named place: halfway between the largest unnamed offset (4) and the smallest named one (10)."""

ATTRIBUTES = ("background", "count", "colour", "shape", "size", "place", "relation", "clean", "all")
"""What :func:`judge` may report, in order."""

_NAMES = list(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=float)
_SQUARE = np.ones((3, 3), dtype=bool)

EDGE = 2
"""Pixels on either side of an outline in which colours blend."""

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Reading:
    """What an image shows.

    Attributes:
        background: name of the background's colour; may be :data:`UNCLEAR`.
        objects: the objects, largest patch first; a colour or shape may be :data:`UNCLEAR`.
        clean: whether background and objects explain every pixel, so that there is no speck.
    """

    background: str
    objects: tuple[SceneObject, ...]
    clean: bool = True


@dataclass(frozen=True)
class _Patch:
    """A patch of one colour: its pixels, its median colour, and the palette's nearest name for it."""

    mask: Mask
    ink: Array
    name: str


def read_scene(image: Image.Image) -> Reading:
    """Read the background and the objects of an image.

    Args:
        image: image of 64x64 pixels.

    Returns:
        The background's colour, colour, shape, centre and radius (pixels) of each object, and whether that is all.

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
    ground = np.median(pixels[rim & (nearest == background)], axis=0)
    patches = _find_patches(pixels, nearest, background, ground)
    covers = _covers(pixels, ground, patches)
    outlines = [fit_outline(cover) for cover in covers]
    objects = tuple(
        SceneObject(
            _named(patch.ink, patch.name),
            outline.shape if has_outline(cover, outline) else UNCLEAR,
            *(outline.x, outline.y, outline.radius),
        )
        for patch, cover, outline in zip(patches, covers, outlines, strict=True)
    )
    return Reading(_named(ground, _NAMES[background]), objects, clean=_is_clean(pixels, ground, patches))


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
    verdict = {
        "background": reading.background == scene.background,
        "count": len(reading.objects) == wanted,
        "clean": reading.clean,
    }
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


def _named(colour: Array, name: str) -> str:
    """The palette's name of a colour, :data:`UNCLEAR` if it is too far from it."""
    return name if np.linalg.norm(colour - COLOURS[name]) <= MAX_COLOUR_DISTANCE else UNCLEAR


def _nearest(pixels: Array, colours: Array) -> NDArray[np.intp]:
    """Index of the nearest colour ``[n, 3]`` to each pixel ``[h, w, 3]``, as ``[h, w]``."""
    return ((pixels[:, :, None] - colours) ** 2).sum(-1).argmin(-1)


def _find_patches(pixels: Array, nearest: NDArray[np.intp], background: int, ground: Array) -> list[_Patch]:
    """The patches of another colour than the background's, largest first.

    Where two colours meet, the blend may pass near a third (red to yellow passes orange). A colour therefore counts as
    present only where a patch of it survives the loss of its rim; every pixel is then given to the nearest of the
    colours that are present, which halves each edge where the outline runs.
    """
    cores = {k: _core(nearest == k) for k in range(len(_NAMES)) if k != background}
    cores = {k: core for k, core in cores.items() if core.any()}
    inks = [np.median(pixels[core], axis=0) for core in cores.values()]
    owner = _nearest(pixels, np.stack([ground, *inks]))
    found = [
        _Patch(mask, ink, _NAMES[colour])
        for number, ((colour, core), ink) in enumerate(zip(cores.items(), inks, strict=True), start=1)
        for mask in _parts(owner == number)
        if mask.sum() >= MIN_AREA and (mask & core).any()
    ]
    return sorted(found, key=lambda patch: -int(patch.mask.sum()))


def _covers(pixels: Array, ground: Array, patches: Sequence[_Patch]) -> list[Array]:
    """The share of each pixel that each patch covers: 1 inside, 0 outside, between them on the antialiased edge.

    The edge is looked for within :data:`EDGE` pixels of a patch that are not next to another one.
    """
    covers = []
    for patch in patches:
        taken = [ndimage.binary_dilation(other.mask, _SQUARE) for other in patches if other is not patch]
        near = ndimage.binary_dilation(patch.mask, _SQUARE, iterations=EDGE)
        near &= ~np.logical_or.reduce(taken) if taken else True
        covers.append(sharpen(_share(pixels, ground, patch.ink)) * near)
    return covers


def _is_clean(pixels: Array, ground: Array, patches: Sequence[_Patch]) -> bool:
    """Whether the background and the patches, in the colours read, explain every pixel.

    At the edge of a patch any blend of its colour and the background's does: `has_outline` judges where the edge runs.
    """
    stray = np.linalg.norm(pixels - ground, axis=-1)
    for patch in patches:
        whole = ndimage.binary_fill_holes(patch.mask)
        outer = ndimage.binary_dilation(whole, _SQUARE, iterations=EDGE)
        inner = ndimage.binary_erosion(whole, _SQUARE, iterations=EDGE, border_value=1)
        share = np.where(inner, 1.0, np.clip(_share(pixels, ground, patch.ink), 0, 1))
        explained = ground + share[..., None] * (patch.ink - ground)
        stray = np.where(outer, np.linalg.norm(pixels - explained, axis=-1), stray)
    return all(part.sum() < MIN_SPECK for part in _parts(stray > MAX_STRAY))


def _share(pixels: Array, ground: Array, ink: Array) -> Array:
    """Share of a patch's colour in each pixel: 1 is the colour, 0 the background; noise goes beyond both."""
    step = ink - ground
    return (pixels - ground) @ step / (step @ step)


def _parts(mask: Mask) -> list[Mask]:
    """The connected parts of a mask."""
    labels, count = ndimage.label(mask)
    return [labels == k for k in range(1, count + 1)]


def _core(mask: Mask) -> Mask:
    """A mask without its rim and specks."""
    parts = [part for part in _parts(ndimage.binary_erosion(mask, _SQUARE)) if part.sum() >= MIN_CORE]
    return np.logical_or.reduce(parts) if parts else np.zeros_like(mask)
