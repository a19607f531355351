"""Captioned images of things on coloured backgrounds, rendered on the fly from sprites."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from PIL import Image
from typing_extensions import override

from sdmodule import __version__
from sdmodule.data.toy.emoji_scenes import emoji_caption, render_emoji, sample_thing, sample_things
from sdmodule.data.toy.rendered import RenderedDataModule, RenderedDataset, check_counts, check_shares
from sdmodule.data.toy.scenes import caption, render, render_collage, sample_scene
from sdmodule.data.toy.sprites import Sprites
from sdmodule.errors import SettingsError, check_bool


class EmojiScenesDataset(RenderedDataset):
    """Scenes of things, and some of coloured shapes.

    Args:
        sprites: the things.
        length: number of images.
        seed: seed of the scenes.
        size: side of an image in pixels.
        two_objects: share of scenes with two things, or two shapes.
        placed: share of the other scenes of things whose size and place are drawn.
        shapes: share of scenes of shapes.
        collages: share of images of patches and strokes without a caption; for autoencoders.
        held_out: False for the combinations and pairs of training, True for the held-out ones, None for all.
    """

    def __init__(
        self,
        sprites: Sprites,
        length: int,
        seed: int = 0,
        size: int = 64,
        two_objects: float = 0.3,
        placed: float = 0.5,
        shapes: float = 0.2,
        collages: float = 0.0,
        held_out: bool | None = False,
    ) -> None:
        super().__init__(length, seed, size)
        self.sprites = sprites
        self.two_objects = two_objects
        self.placed = placed
        self.shapes = shapes
        self.collages = collages
        self.held_out = held_out

    @override
    def content(self, index: int) -> str:
        return f"things {index} {self._settings}"

    @cached_property
    def _settings(self) -> str:
        settings = (self.seed, self.two_objects, self.placed, self.shapes, self.collages, self.held_out)
        return f"{settings} {self.sprites.content()} of sdmodule {__version__}"

    @override
    def draw(self, rng: random.Random) -> tuple[str, Callable[[], Image.Image]]:
        kind = rng.random()
        if kind < self.collages:
            return "", partial(render_collage, rng, self.size)
        if kind < self.collages + self.shapes:
            shapes = sample_scene(rng, self.two_objects, self.held_out)
            return caption(shapes), partial(render, shapes, self.size)
        if rng.random() < self.two_objects:
            things = sample_things(rng, self.sprites, self.held_out)
        else:
            things = sample_thing(rng, self.sprites, self.placed, self.held_out)
        return emoji_caption(things), partial(render_emoji, things, self.sprites, self.size)


class EmojiScenesDataModule(RenderedDataModule):
    """Scenes of things for training and, from another seed, for validation.

    Args:
        sprites: folder of sprites, see `Sprites`.
        styles: names of the styles to draw in.
        things: names of the things to draw; None for all of them.
        batch_size: images per batch.
        train_length: training images per epoch.
        val_length: validation images.
        size: side of an image in pixels.
        two_objects: share of scenes with two things, or two shapes.
        placed: share of the other scenes of things whose size and place are drawn.
        shapes: share of scenes of coloured shapes.
        collages: share of training images without a caption, for autoencoders.
        hold_out: keep every tenth combination of a thing and a style, every tenth pair of things and six combinations
            of a colour and a shape out of the training.
        seed: seed of the scenes.
        num_workers: processes that render; 0 renders in the training's own; None is by device, see `loading_options`.

    Raises:
        SettingsError: for a value out of range, or for sprites that are not there.
    """

    def __init__(
        self,
        sprites: str,
        styles: Sequence[str] = ("noto",),
        things: Sequence[str] | None = None,
        batch_size: int = 32,
        train_length: int = 60_000,
        val_length: int = 256,
        size: int = 64,
        two_objects: float = 0.3,
        placed: float = 0.5,
        shapes: float = 0.2,
        collages: float = 0.0,
        hold_out: bool = True,
        seed: int = 0,
        num_workers: int | None = None,
    ) -> None:
        check_bool("data.hold_out", hold_out)
        check_counts(seed, batch_size=batch_size, train_length=train_length, val_length=val_length, size=size)
        check_shares(two_objects=two_objects, placed=placed, shapes=shapes, collages=collages)
        if shapes + collages > 1:
            raise SettingsError(f"data.shapes={shapes}, data.collages={collages}: together must be at most 1.")
        found = Sprites(sprites, styles, things)
        if two_objects and len(found.names) < 2:
            raise SettingsError(f"data.two_objects={two_objects}: needs at least two things; set data.two_objects=0.")
        shared: dict[str, Any] = {"size": size, "two_objects": two_objects, "placed": placed, "shapes": shapes}
        shared["held_out"] = False if hold_out else None
        train = EmojiScenesDataset(found, train_length, seed, collages=collages, **shared)
        super().__init__(
            train, EmojiScenesDataset(found, val_length, seed + 1, **shared), batch_size, seed, num_workers
        )
