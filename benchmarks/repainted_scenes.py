"""Scenes whose object is to be painted over with another one: what inpainting is measured on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmarks.scene_reader import judge, read_scene
from sdmodule.data.toy.scenes import COLOURS, HELD_OUT, IMAGE_SIZE, SHAPES, Scene, sample_single

MARGIN = 3
"""Pixels of background round the object that are masked with it, so that its outline tells nothing of its shape."""


@dataclass(frozen=True)
class Repaint:
    """A scene, the box of its object, and the scene that is asked for in its place.

    Attributes:
        before: what the image shows.
        wanted: the same with an object of another shape and colour.
        box: ``(x0, y0, x1, y1)`` in pixels, the last two exclusive.
    """

    before: Scene
    wanted: Scene
    box: tuple[int, int, int, int]


def draw_repaint(rng: random.Random) -> Repaint:
    """Draw a scene of one object and another object for its place, neither of a held-out pair."""
    before = sample_single(rng)
    (old,) = before.objects
    others = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if colour not in (old.colour, before.background) and shape != old.shape and (colour, shape) not in HELD_OUT
    ]
    colour, shape = rng.choice(others)
    reach = old.radius * 1.05 + MARGIN  # no outline reaches further than 1.05 of its radius
    low = (max(math.floor(at - reach), 0) for at in (old.x, old.y))
    high = (min(math.ceil(at + reach), IMAGE_SIZE) for at in (old.x, old.y))
    return Repaint(before, replace(before, objects=(replace(old, colour=colour, shape=shape),)), (*low, *high))


def judge_repaint(repaint: Repaint, before: Image.Image, after: Image.Image) -> dict[str, bool]:
    """Judge the words of the prompt, the object as such (its colour and its shape), and what is around it.

    ``kept`` is whether not one pixel outside the box differs.
    """
    verdict = judge(repaint.wanted, read_scene(after))
    changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
    x0, y0, x1, y1 = repaint.box
    changed[y0:y1, x0:x1] = False
    return verdict | {"object": verdict["colour"] and verdict["shape"], "kept": not changed.any()}
