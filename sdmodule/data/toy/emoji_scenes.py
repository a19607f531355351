"""Scenes of things: one or two sprites on a coloured background, with captions.

The grammar of the captions is that of `scenes`, with things for coloured shapes, and with a style where it is not the
plain one::

    a [small|large] THING [on the left|on the right|at the top|at the bottom] on a COLOUR background[, STYLE style]
    a THING to the left of|to the right of|above|below a THING on a COLOUR background[, STYLE style]

``a`` is ``an`` before a vowel, and is left out before several things: *grapes*.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from sdmodule.data.toy.scenes import COLOURS, IMAGE_SIZE, PLACES, RELATIONS
from sdmodule.data.toy.sprites import PLAIN, Sprites

SIZES: dict[str | None, tuple[float, float]] = {"small": (11.0, 13.0), "large": (25.0, 28.0), None: (18.0, 23.0)}
"""Range of half the side of a thing in pixels, by the word for its size."""

PAIR_SIZES = (12.0, 14.0)
"""Range of half the side of each of two things."""

AN = ("a", "e", "i", "o", "u", "hourglass")
NOT_AN = ("ewe", "one ", "unicorn")
"""How words begin that take ``an``, and those among them that do not."""


@dataclass(frozen=True)
class Thing:
    """One thing: its name, its centre and half its side in pixels."""

    name: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class EmojiScene:
    """A background, a style, one or two things, and the words for size, place or relation that the caption uses."""

    background: str
    style: str
    things: tuple[Thing, ...]
    size: str | None = None
    place: str | None = None
    relation: str | None = None


def with_article(words: str, name: str) -> str:
    """Words that end in the name of a thing, with the indefinite article, or without one for several things."""
    if name.endswith("s") and not name.endswith(("ss", "us", "is")):
        return words
    return f"an {words}" if words.startswith(AN) and not words.startswith(NOT_AN) else f"a {words}"


def emoji_caption(scene: EmojiScene) -> str:
    """The caption of a scene, in the grammar of this module."""
    first, *second = (thing.name for thing in scene.things)
    style = "" if scene.style == PLAIN else f", {scene.style} style"
    ending = f"on {with_article(scene.background, scene.background)} background{style}"
    if second:
        return f"{with_article(first, first)} {scene.relation} {with_article(second[0], second[0])} {ending}"
    words = f"{scene.size} {first}" if scene.size else first
    place = f" {scene.place}" if scene.place else ""
    return f"{with_article(words, first)}{place} {ending}"


def render_emoji(scene: EmojiScene, sprites: Sprites, size: int = IMAGE_SIZE) -> Image.Image:
    """Render a scene as an RGB image of ``size`` x ``size`` pixels."""
    image = Image.new("RGBa", (size, size), (*COLOURS[scene.background], 255))
    scale = size / IMAGE_SIZE
    for thing in scene.things:
        side = max(1, round(2 * thing.radius * scale))
        sprite = sprites.image(thing.name, scene.style).resize((side, side), Image.Resampling.LANCZOS)
        corner = round(thing.x * scale - side / 2), round(thing.y * scale - side / 2)
        layer = Image.new("RGBa", (size, size))
        layer.paste(sprite, corner)
        image = Image.alpha_composite(image.convert("RGBA"), layer.convert("RGBA")).convert("RGBa")
    return image.convert("RGBA").convert("RGB")


def sample_thing(rng: random.Random, sprites: Sprites, placed: float, held_out: bool | None = False) -> EmojiScene:
    """Draw a scene of one thing.

    Args:
        rng: the random generator.
        sprites: the things.
        placed: probability that a size and a place are drawn; otherwise the thing is in the middle, at its usual size.
        held_out: False for the (thing, style) combinations of training, True for the held-out ones, None for all.
    """
    name, style = rng.choice(sprites.combinations(held_out))
    background = rng.choice(list(COLOURS))
    size, place = None, None
    if rng.random() < placed:
        size, place = rng.choice([None, None, "small", "large"]), rng.choice([None, *PLACES])
    radius = rng.uniform(*SIZES[size])
    dx, dy = PLACES[place]
    middle, reach = IMAGE_SIZE / 2, IMAGE_SIZE / 2 - radius
    offset, slack = rng.uniform(min(9.0, reach), reach), min(2.0, reach)
    x = middle + (dx * offset if dx else rng.uniform(-slack, slack))
    y = middle + (dy * offset if dy else rng.uniform(-slack, slack))
    return EmojiScene(background, style, (Thing(name, x, y, radius),), size, place)


def sample_things(rng: random.Random, sprites: Sprites, held_out: bool | None = False) -> EmojiScene:
    """Draw a scene of two different things in one style.

    Args:
        rng: the random generator.
        sprites: the things.
        held_out: False for ordered pairs of training, of things that training shows in this style; True for held-out
            pairs of such things; None for all.
    """
    style = rng.choice(sprites.styles)
    known = None if held_out is None else False
    names = [name for name, own in sprites.combinations(known) if own == style]
    while True:
        first, second = rng.sample(names, 2)
        if held_out is None or sprites.is_held_out_pair(first, second) == held_out:
            break
    relation = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[relation]
    middle, distance = IMAGE_SIZE / 2, rng.uniform(15.0, 16.5)
    things = []
    for name, sign in ((first, 1.0), (second, -1.0)):
        x = middle + sign * dx * distance + rng.uniform(-0.6, 0.6)
        y = middle + sign * dy * distance + rng.uniform(-0.6, 0.6)
        things.append(Thing(name, x, y, rng.uniform(*PAIR_SIZES)))
    return EmojiScene(rng.choice(list(COLOURS)), style, tuple(things), relation=relation)
