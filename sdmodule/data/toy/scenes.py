"""The toy domain of the embedded model: scenes of coloured shapes, with captions.

A scene is a background and one or two objects. `sample_scene` draws one at random, `caption` describes it and
`render` paints it. The grammar of the captions is

    a [small|large] COLOUR SHAPE [on the left|on the right|at the top|at the bottom] on a COLOUR background
    a COLOUR SHAPE to the left of|to the right of|above|below a COLOUR SHAPE on a COLOUR background

Six (colour, shape) pairs are held out of training (`HELD_OUT`): sampling them shows whether a model composes words
or has memorized images.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Side of an image, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 72),
    "blue": (48, 88, 220),
    "yellow": (244, 214, 52),
    "purple": (146, 62, 176),
    "orange": (242, 140, 32),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
}

SIZES = {"small": (7.0, 9.0), "large": (16.0, 19.0), None: (10.0, 17.0)}
"""Range of an object's radius in pixels, by the word for its size."""

PAIR_SIZES = (8.5, 11.5)
"""Range of the radius of each of two objects."""

PLACES: dict[str | None, tuple[float, float]] = {
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
    None: (0.0, 0.0),
}
"""Direction from the centre of the image (x to the right, y down), by the words for the place."""

RELATIONS: dict[str, tuple[float, float]] = {
    "to the left of": (-1.0, 0.0),
    "to the right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}
"""Direction of the first object as seen from the second."""

HELD_OUT = frozenset(
    {
        ("red", "heart"),
        ("blue", "star"),
        ("green", "triangle"),
        ("yellow", "diamond"),
        ("purple", "square"),
        ("white", "circle"),
    }
)
"""(colour, shape) pairs that occur in no training image."""


def _regular(corners: int, start: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star if ``inner`` gives the radius of its notches."""
    radii = [1.0] if inner is None else [1.0, inner]
    count = corners * len(radii)
    return [
        (radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a))
        for k in range(count)
        for a in [start + 2 * math.pi * k / count]
    ]


def _heart(points: int = 60) -> list[tuple[float, float]]:
    """Corners of the classic parametric heart, scaled to the unit disc."""
    outline = []
    for k in range(points):
        t = 2 * math.pi * k / points
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((x / 17, -(y + 2.5) / 17))
    return outline


SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(72, 0.0),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)],
    "star": _regular(5, -math.pi / 2, inner=0.42),
    "heart": _heart(),
    "diamond": [(0.0, -1.05), (0.72, 0.0), (0.0, 1.05), (-0.72, 0.0)],
}
"""Outline of each shape: a polygon around the origin with a radius of about one (y down)."""


@dataclass(frozen=True)
class SceneObject:
    """One shape: its colour and form in words, its centre and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background, one or two objects, and the words for size, place or relation that the caption uses."""

    background: str
    objects: tuple[SceneObject, ...]
    size: str | None = None
    place: str | None = None
    relation: str | None = None


def caption(scene: Scene) -> str:
    """The caption of a scene, in the grammar of this module."""
    words = [f"{o.colour} {o.shape}" for o in scene.objects]
    if scene.relation is not None:
        return f"a {words[0]} {scene.relation} a {words[1]} on a {scene.background} background"
    size = f"{scene.size} " if scene.size else ""
    place = f" {scene.place}" if scene.place else ""
    return f"a {size}{words[0]}{place} on a {scene.background} background"


def coverage(item: SceneObject, size: int = IMAGE_SIZE, oversample: int = 4) -> Image.Image:
    """The share of each pixel that an object covers, as an image of ``size`` x ``size`` grey levels (255 is all)."""
    mask = Image.new("L", (size * oversample, size * oversample))
    scale = oversample * size / IMAGE_SIZE
    corners = [(item.x + item.radius * px, item.y + item.radius * py) for px, py in SHAPES[item.shape]]
    ImageDraw.Draw(mask).polygon([(x * scale, y * scale) for x, y in corners], fill=255)
    return mask.reduce(oversample)


def render(scene: Scene, size: int = IMAGE_SIZE, oversample: int = 4) -> Image.Image:
    """Render a scene as an RGB image of ``size`` x ``size`` pixels, antialiased."""
    image = Image.new("RGB", (size, size), COLOURS[scene.background])
    for item in scene.objects:
        image.paste(COLOURS[item.colour], mask=coverage(item, size, oversample))
    return image


def _pairs(held_out: bool | None) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of training (False), the held-out ones (True), or all (None)."""
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [pair for pair in every if held_out is None or (pair in HELD_OUT) == held_out]


def sample_single(rng: random.Random, held_out: bool | None = False) -> Scene:
    """Draw a scene of one object.

    Args:
        rng: the random generator.
        held_out: False for the pairs of training, True for the held-out ones, None for all.
    """
    colour, shape = rng.choice(_pairs(held_out))
    background = rng.choice([c for c in COLOURS if c != colour])
    size = rng.choice([None, None, "small", "large"])
    place = rng.choice([None, *PLACES])
    radius = rng.uniform(*SIZES[size])
    dx, dy = PLACES[place]
    # a named place is between the margin and a third of the image; the other axis stays near the centre
    middle, reach = IMAGE_SIZE / 2, IMAGE_SIZE / 2 - radius - 1.0
    offset = rng.uniform(min(10.0, reach), reach)
    slack = min(4.0, reach)
    x = middle + (dx * offset if dx else rng.uniform(-slack, slack))
    y = middle + (dy * offset if dy else rng.uniform(-slack, slack))
    return Scene(background, (SceneObject(colour, shape, x, y, radius),), size=size, place=place)


def sample_double(rng: random.Random, held_out: bool | None = False) -> Scene:
    """Draw a scene of two different objects; arguments as for `sample_single`."""
    first, second = rng.sample(_pairs(held_out), 2)
    background = rng.choice([c for c in COLOURS if c not in (first[0], second[0])])
    relation = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[relation]
    middle, distance = IMAGE_SIZE / 2, rng.uniform(14.0, 18.0)
    shift = rng.uniform(-2.0, 2.0), rng.uniform(-2.0, 2.0)
    objects = []
    for (colour, shape), sign in ((first, 1.0), (second, -1.0)):
        x = middle + sign * dx * distance + shift[0] + rng.uniform(-1.5, 1.5)
        y = middle + sign * dy * distance + shift[1] + rng.uniform(-1.5, 1.5)
        objects.append(SceneObject(colour, shape, x, y, rng.uniform(*PAIR_SIZES)))
    return Scene(background, tuple(objects), relation=relation)


def sample_scene(rng: random.Random, two_objects: float = 0.4, held_out: bool | None = False) -> Scene:
    """Draw a scene, of two objects with probability ``two_objects``, else of one."""
    draw = sample_double if rng.random() < two_objects else sample_single
    return draw(rng, held_out)


def render_collage(rng: random.Random, size: int = IMAGE_SIZE, oversample: int = 4) -> Image.Image:
    """Patches and strokes of any colour over a gradient: images without a caption, for training an autoencoder.

    They contain none of the six shapes, so nothing that is held out is learned from them. They teach the autoencoder
    colours and edges that scenes lack, so that it is usable for other images too.
    """

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize((size, size))
    image = Image.composite(Image.new("RGB", (size, size), colour()), Image.new("RGB", (size, size), colour()), ramp)
    for _ in range(rng.randint(1, 7)):
        mask = Image.new("L", (size * oversample, size * oversample))
        draw = ImageDraw.Draw(mask)
        x, y = rng.uniform(0, size), rng.uniform(0, size)
        reach = rng.uniform(3, size / 3)
        box = [(x - reach) * oversample, (y - reach * rng.uniform(0.3, 1)) * oversample]
        box += [(x + reach) * oversample, (y + reach * rng.uniform(0.3, 1)) * oversample]
        kind = rng.randrange(4)
        if kind == 0:
            draw.ellipse(box, fill=255)
        elif kind == 1:
            draw.arc(box, rng.uniform(0, 360), rng.uniform(0, 360), fill=255, width=rng.randint(4, 16))
        elif kind == 2:
            corners = [(rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3])) for _ in range(rng.randint(4, 7))]
            draw.polygon(corners, fill=255)
        else:
            draw.line(box, fill=255, width=rng.randint(4, 16))
        image.paste(colour(), mask=mask.reduce(oversample))
    return image
