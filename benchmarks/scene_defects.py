"""Wrong images of scenes: one thing differs from the caption, or the drawing has a defect. A strict reader finds it.

Each change of `CHANGES` draws a scene wrongly, or gives None where it does not apply, as a wrong relation to a scene
of one object.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from sdmodule.data.toy.scenes import COLOURS, IMAGE_SIZE, PLACES, SHAPES, SIZES, Scene, SceneObject, coverage, render

Colour = tuple[int, int, int]
Mask = NDArray[np.bool_]

OVERSAMPLE = 4
"""Samples per pixel along each axis, as the renderer takes."""

LOST_POINT = 0.3
"""Share of the radius that the points of a star or diamond lose when they are rounded."""

ROUNDING = {"star": 0.539, "diamond": 1.302}
"""Radius of the rounding at which a point loses one unit of length: with the half angle a at the point of the polygon,
``1 / (1 / sin(a) - 1)``."""

CORNERS = range(5, 9)
"""Numbers of corners of a circle that has corners."""

SPECK = range(2, 5)
"""Sides of a speck, in pixels."""

COLOUR_SHIFT = 50.0
"""How far a colour that is off lies from its own, in RGB of 0 to 255."""

FAR_FROM_PALETTE = 45.0
"""Least distance of a colour that is off from every colour of the palette."""


def wrong_images(
    scenes: Sequence[Scene], per_change: int, rng: random.Random
) -> dict[str, list[tuple[Scene, Image.Image]]]:
    """Images of scenes that are wrong, by the name of the change.

    Args:
        scenes: scenes to draw wrongly, each at most once per change.
        per_change: number of images of each change; fewer where it applies to fewer scenes.
        rng: the random generator.

    Returns:
        For each of `CHANGES` that applies to a scene, pairs of a scene and an image that does not follow its caption.
    """
    wrong = {}
    for name, change in CHANGES.items():
        found: list[tuple[Scene, Image.Image]] = []
        for scene in rng.sample(list(scenes), len(scenes)):
            if len(found) == per_change:
                break
            if (image := change(scene, rng)) is not None:
                found.append((scene, image))
        if found:
            wrong[name] = found
    return wrong


def other_shape(scene: Scene, rng: random.Random) -> Image.Image:
    """One object has another shape."""
    return _with_object(scene, rng, lambda item: replace(item, shape=_other(SHAPES, rng, item.shape)))


def other_colour(scene: Scene, rng: random.Random) -> Image.Image:
    """One object has another colour."""
    return _with_object(
        scene, rng, lambda item: replace(item, colour=_other(COLOURS, rng, item.colour, scene.background))
    )


def other_background(scene: Scene, rng: random.Random) -> Image.Image:
    """The background has another colour."""
    used = [scene.background, *(item.colour for item in scene.objects)]
    return render(replace(scene, background=_other(COLOURS, rng, *used)))


def other_size(scene: Scene, rng: random.Random) -> Image.Image | None:
    """The object has the other named size, or one between the two."""
    if scene.size is None:
        return None
    radius = rng.choice([rng.uniform(*SIZES["large" if scene.size == "small" else "small"]), rng.uniform(12.5, 13.5)])
    return _with_object(scene, rng, lambda item: _inside(replace(item, radius=radius)))


def other_place(scene: Scene, rng: random.Random) -> Image.Image | None:
    """The object is in another place, as far from the centre as before, or in the centre."""
    if scene.place is None:
        return None
    middle = IMAGE_SIZE / 2
    dx, dy = PLACES[rng.choice([place for place in PLACES if place != scene.place])]

    def move(item: SceneObject) -> SceneObject:
        offset = max(abs(item.x - middle), abs(item.y - middle))
        return replace(item, x=middle + dx * offset, y=middle + dy * offset)

    return _with_object(scene, rng, move)


def other_relation(scene: Scene, rng: random.Random) -> Image.Image | None:
    """The two objects are turned around the centre of the image, by a quarter or a half."""
    if scene.relation is None:
        return None
    middle, turn = IMAGE_SIZE / 2, 1j ** rng.choice([1, 2, 3])

    def move(item: SceneObject) -> SceneObject:
        place = complex(item.x - middle, item.y - middle) * turn
        return replace(item, x=middle + place.real, y=middle + place.imag)

    return render(replace(scene, objects=tuple(move(item) for item in scene.objects)))


def rounded_points(scene: Scene, rng: random.Random) -> Image.Image | None:
    """Stars and diamonds have rounded points."""
    return _with_outlines(scene, {shape: _rounded for shape in ROUNDING}, rng)


def circles_with_corners(scene: Scene, rng: random.Random) -> Image.Image | None:
    """Circles are polygons of five to eight corners, turned at random, with the area of the circle or nearly."""
    return _with_outlines(scene, {"circle": _polygon}, rng)


def speck(scene: Scene, rng: random.Random) -> Image.Image:
    """A small square of a colour that does not occur in the scene lies anywhere."""
    used = [scene.background, *(item.colour for item in scene.objects)]
    image, side = render(scene), rng.choice(SPECK)
    x, y = rng.randrange(IMAGE_SIZE - side), rng.randrange(IMAGE_SIZE - side)
    image.paste(COLOURS[_other(COLOURS, rng, *used)], (x, y, x + side, y + side))
    return image


def colour_off(scene: Scene, rng: random.Random) -> Image.Image:
    """The background, or an object, has a colour near its own that is none of the palette's."""
    colours = [COLOURS[scene.background], *(COLOURS[item.colour] for item in scene.objects)]
    chosen = rng.randrange(len(colours))
    colours[chosen] = _off(colours[chosen], rng)
    return _paint(colours[0], [(c, _mask(item)) for c, item in zip(colours[1:], scene.objects, strict=True)])


CHANGES: dict[str, Callable[[Scene, random.Random], Image.Image | None]] = {
    "another shape": other_shape,
    "another colour": other_colour,
    "another background": other_background,
    "another size": other_size,
    "another place": other_place,
    "another relation": other_relation,
    "rounded points": rounded_points,
    "circles with corners": circles_with_corners,
    "a speck": speck,
    "a colour that is off": colour_off,
}
"""What is wrong, and how a scene is drawn so; None where it does not apply."""


def _other(names: Iterable[str], rng: random.Random, *used: str) -> str:
    return rng.choice([name for name in names if name not in used])


def _with_object(scene: Scene, rng: random.Random, change: Callable[[SceneObject], SceneObject]) -> Image.Image:
    """A scene of which one object is changed."""
    objects = list(scene.objects)
    chosen = rng.randrange(len(objects))
    objects[chosen] = change(objects[chosen])
    return render(replace(scene, objects=tuple(objects)))


def _inside(item: SceneObject) -> SceneObject:
    """An object, moved so that it lies within the image."""
    low, high = item.radius + 1, IMAGE_SIZE - item.radius - 1
    return replace(item, x=min(max(item.x, low), high), y=min(max(item.y, low), high))


def _with_outlines(
    scene: Scene, outlines: dict[str, Callable[[SceneObject, random.Random], Mask]], rng: random.Random
) -> Image.Image | None:
    """A scene with other outlines of some shapes; None if it has none of these shapes."""
    if all(item.shape not in outlines for item in scene.objects):
        return None
    masks = [outlines[item.shape](item, rng) if item.shape in outlines else _mask(item) for item in scene.objects]
    colours = [COLOURS[item.colour] for item in scene.objects]
    return _paint(COLOURS[scene.background], list(zip(colours, masks, strict=True)))


def _paint(background: Colour, patches: Sequence[tuple[Colour, Mask]]) -> Image.Image:
    """Paint oversampled masks as the renderer does."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    for colour, mask in patches:
        image.paste(colour, mask=Image.fromarray(mask.astype(np.uint8) * 255).reduce(OVERSAMPLE))
    return image


def _mask(item: SceneObject) -> Mask:
    """The oversampled mask of an object, ``[256, 256]``."""
    return np.asarray(coverage(item, IMAGE_SIZE * OVERSAMPLE, oversample=1)) > 0


def _rounded(item: SceneObject, rng: random.Random) -> Mask:
    """The mask of an object opened by a disc, so that its points lose `LOST_POINT` of the radius."""
    disc = OVERSAMPLE * LOST_POINT * item.radius * ROUNDING[item.shape]
    eroded = ndimage.distance_transform_edt(_mask(item)) > disc
    return np.asarray(ndimage.distance_transform_edt(~eroded) <= disc)


def _polygon(item: SceneObject, rng: random.Random) -> Mask:
    """A regular polygon whose corners lie as far outside a circle as its sides lie inside, by ratio."""
    count, turn = rng.choice(CORNERS), rng.uniform(0, 2 * math.pi)
    radius = item.radius / math.sqrt(math.cos(math.pi / count))
    angles = [turn + 2 * math.pi * k / count for k in range(count)]
    corners = [(item.x + radius * math.cos(a), item.y + radius * math.sin(a)) for a in angles]
    mask = Image.new("L", (IMAGE_SIZE * OVERSAMPLE, IMAGE_SIZE * OVERSAMPLE))
    ImageDraw.Draw(mask).polygon([(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in corners], fill=255)
    return np.asarray(mask) > 0


def _off(colour: Colour, rng: random.Random) -> Colour:
    """A colour `COLOUR_SHIFT` from another and `FAR_FROM_PALETTE` from every colour of the palette."""
    while True:
        step = np.array([rng.gauss(0, 1) for _ in range(3)])
        shifted = np.array(colour) + COLOUR_SHIFT * step / np.linalg.norm(step)
        if shifted.min() < 0 or shifted.max() > 255:
            continue
        if min(np.linalg.norm(shifted - named) for named in COLOURS.values()) >= FAR_FROM_PALETTE:
            red, green, blue = shifted.round().astype(int).tolist()
            return red, green, blue
