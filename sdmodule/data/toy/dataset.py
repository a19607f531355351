"""Captioned images of coloured shapes, rendered on the fly: the training data of the embedded model."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from PIL import Image
from typing_extensions import override

from sdmodule import __version__
from sdmodule.data.toy.rendered import RenderedDataModule, RenderedDataset, check_counts, check_shares
from sdmodule.data.toy.scenes import caption, render, render_collage, sample_scene


class ShapesDataset(RenderedDataset):
    """Scenes of coloured shapes.

    Args:
        length: number of images.
        seed: seed of the scenes.
        size: side of an image in pixels.
        two_objects: share of scenes with two objects.
        collages: share of images that show anything but the grammar's shapes and have no caption; for autoencoders.
    """

    def __init__(
        self, length: int, seed: int = 0, size: int = 64, two_objects: float = 0.4, collages: float = 0.0
    ) -> None:
        super().__init__(length, seed, size)
        self.two_objects = two_objects
        self.collages = collages

    @override
    def content(self, index: int) -> str:
        return f"scene {self.seed}/{index} {self.two_objects} {self.collages} of sdmodule {__version__}"

    @override
    def draw(self, rng: random.Random) -> tuple[str, Callable[[], Image.Image]]:
        if rng.random() < self.collages:
            return "", partial(render_collage, rng, self.size)
        scene = sample_scene(rng, self.two_objects)
        return caption(scene), partial(render, scene, self.size)


class ShapesDataModule(RenderedDataModule):
    """Scenes of shapes for training and, from another seed, for validation.

    Args:
        batch_size: images per batch.
        train_length: training images per epoch.
        val_length: validation images.
        size: side of an image in pixels.
        two_objects: share of scenes with two objects.
        collages: share of training images without a caption, for autoencoders.
        seed: seed of the scenes.
        num_workers: processes that render; 0 renders in the training's own; None is by device, see `loading_options`.

    Raises:
        SettingsError: for a value out of range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        train_length: int = 60_000,
        val_length: int = 256,
        size: int = 64,
        two_objects: float = 0.4,
        collages: float = 0.0,
        seed: int = 0,
        num_workers: int | None = None,
    ) -> None:
        check_counts(seed, batch_size=batch_size, train_length=train_length, val_length=val_length)
        check_shares(two_objects=two_objects, collages=collages)
        train = ShapesDataset(train_length, seed, size, two_objects, collages)
        super().__init__(train, ShapesDataset(val_length, seed + 1, size, two_objects), batch_size, seed, num_workers)
