"""Scenes for the inpainting benchmark: the object of each is to be replaced by another one."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmarks.scene_reader import judge, read_scene
from sdmodule.data.toy.scenes import COLOURS, HELD_OUT, IMAGE_SIZE, SHAPES, Scene, sample_single

MARGIN = 3
"""Pixels of background that are masked around the object, so that the mask does not reveal its shape."""


@dataclass(frozen=True)
class InpaintScene:
    """A scene, the box of its object, and the scene that the prompt asks for.

    Attributes:
        before: the scene of the image.
        wanted: the same scene with an object of another shape and colour.
        box: masked box ``(x0, y0, x1, y1)`` in pixels; x1 and y1 are exclusive.
    """

    before: Scene
    wanted: Scene
    box: tuple[int, int, int, int]


def draw_inpaint_scene(rng: random.Random) -> InpaintScene:
    """Draw a scene of one object and another object to replace it, neither of them a held-out pair."""
    before = sample_single(rng)
    (old,) = before.objects
    others = [
        (colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        if colour not in (old.colour, before.background) and shape != old.shape and (colour, shape) not in HELD_OUT
    ]
    colour, shape = rng.choice(others)
    reach = old.radius * 1.05 + MARGIN  # no outline exceeds 1.05 times its radius
    low = (max(math.floor(at - reach), 0) for at in (old.x, old.y))
    high = (min(math.ceil(at + reach), IMAGE_SIZE) for at in (old.x, old.y))
    return InpaintScene(before, replace(before, objects=(replace(old, colour=colour, shape=shape),)), (*low, *high))


def judge_inpainting(scene: InpaintScene, before: Image.Image, after: Image.Image) -> dict[str, bool]:
    """Judge an inpainted image against its prompt.

    Returns:
        The verdict of `judge` on the wanted scene; ``object``, whether colour and shape are both right; and ``kept``,
        whether every pixel outside the box is unchanged.
    """
    verdict = judge(scene.wanted, read_scene(after))
    changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
    x0, y0, x1, y1 = scene.box
    changed[y0:y1, x0:x1] = False
    return verdict | {"object": verdict["colour"] and verdict["shape"], "kept": not changed.any()}
