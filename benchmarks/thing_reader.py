"""Reads things, styles and backgrounds in images of `data=emoji_scenes` with a scorer of images and texts.

A thing is read among the names of all sprites: of the captions ``a NAME on a COLOUR background, STYLE style`` with each
name, in the style and on the background that were asked for, the one nearest to the image counts. Style and background
are read likewise, with the other words as they were asked for. Two things are read one by one, each in the square
around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from sdmodule.data.toy.emoji_scenes import EmojiScene, Thing, emoji_caption
from sdmodule.data.toy.scenes import COLOURS, IMAGE_SIZE, RELATIONS
from sdmodule.evaluation import Scorer
from sdmodule.evaluation.scorer import features_of, features_of_texts

BATCH = 64
"""Images or texts per call of the scorer."""

TOP = 5
"""The k of the measure ``name in 5``."""

MEASURES = ("name", f"name in {TOP}", "style", "background", "all")

Verdict = dict[str, bool]


@dataclass(frozen=True)
class Reading:
    """What was read of one thing.

    Attributes:
        names: the names nearest to the image, nearest first, in the style and on the background that were asked for.
        style: the nearest style.
        background: the nearest background.
    """

    names: tuple[str, ...]
    style: str
    background: str


class ThingReader:
    """Reads things with a scorer.

    Args:
        scorer: maps images and texts into one space.
        names: all names that it chooses from.
        styles: all styles that it chooses from.
    """

    def __init__(self, scorer: Scorer, names: Sequence[str], styles: Sequence[str]) -> None:
        self.scorer = scorer
        self.names = list(names)
        self.styles = list(styles)
        self._known: dict[tuple[str, str], Tensor] = {}

    def read_all(self, scenes: Iterable[EmojiScene], images: Iterable[Image.Image]) -> list[list[Reading]]:
        """Read the things of each scene in its image, in the order of the caption."""
        scenes = list(scenes)
        views = (view for scene, image in zip(scenes, images, strict=True) for view in thing_views(scene, image))
        rows = iter(normalize(features_of(views, [self.scorer], BATCH)[0], dim=-1))
        return [[self._read(next(rows), thing.name, scene) for thing in scene.things] for scene in scenes]

    def _read(self, image: Tensor, name: str, scene: EmojiScene) -> Reading:
        own = self.names.index(name)
        asked = self._texts(scene.style, scene.background)
        nearest = (asked @ image).topk(min(TOP, len(self.names))).indices.tolist()
        styles = torch.stack([self._texts(style, scene.background)[own] for style in self.styles])
        backgrounds = torch.stack([self._texts(scene.style, colour)[own] for colour in COLOURS])
        return Reading(
            tuple(self.names[k] for k in nearest),
            self.styles[int((styles @ image).argmax())],
            list(COLOURS)[int((backgrounds @ image).argmax())],
        )

    def _texts(self, style: str, background: str) -> Tensor:
        """Features ``[N, D]`` of the captions of all names in a style on a background."""
        if (style, background) not in self._known:
            texts = [plain_caption(name, style, background) for name in self.names]
            self._known[style, background] = normalize(features_of_texts(texts, self.scorer, BATCH), dim=-1)
        return self._known[style, background]


def plain_caption(name: str, style: str, background: str) -> str:
    """The caption of a thing without a size or a place."""
    return emoji_caption(EmojiScene(background, style, (Thing(name, 0.0, 0.0, 0.0),)))


def thing_views(scene: EmojiScene, image: Image.Image) -> list[Image.Image]:
    """The image of one thing; of two things the square of half the side around each, by their relation."""
    if scene.relation is None:
        return [image]
    width, height = image.size
    views = []
    for sign in (1, -1):
        dx, dy = (sign * direction for direction in RELATIONS[scene.relation])
        x, y = width * (1 + dx) / 4, height * (1 + dy) / 4
        view = image.crop((round(x), round(y), round(x + width / 2), round(y + height / 2)))
        views.append(view.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    return views


def judge(scene: EmojiScene, readings: Sequence[Reading]) -> Verdict:
    """Which words of a scene were read rightly; for two things, in both."""
    pairs = list(zip(scene.things, readings, strict=True))
    verdict = {
        "name": all(reading.names[0] == thing.name for thing, reading in pairs),
        f"name in {TOP}": all(thing.name in reading.names for thing, reading in pairs),
        "style": all(reading.style == scene.style for reading in readings),
        "background": all(reading.background == scene.background for reading in readings),
    }
    return verdict | {"all": verdict["name"] and verdict["style"] and verdict["background"]}
