"""Captioned images of coloured shapes, rendered on the fly: the training data of the embedded model."""

from __future__ import annotations

import random
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule import __version__
from sdmodule.data.base import TrainingData
from sdmodule.data.example import CaptionedImage, View
from sdmodule.data.sampler import training_loader
from sdmodule.data.toy.scenes import Scene, caption, render, render_collage, sample_scene
from sdmodule.data.worker_processes import check_workers
from sdmodule.errors import check_int, check_number, check_seed
from sdmodule.io.images import image_to_tensor


class ShapesDataset(Dataset[CaptionedImage]):
    """``length`` scenes; scene k depends on (seed, k) alone, not on the order or the number of workers.

    Args:
        length: number of images.
        seed: seed of the scenes.
        size: side of an image in pixels.
        two_objects: share of scenes with two objects.
        collages: share of images that show anything but the grammar's shapes and have no caption; for autoencoders.
    """

    center_crop, random_flip, fixed_captions = True, False, True

    def __init__(
        self, length: int, seed: int = 0, size: int = 64, two_objects: float = 0.4, collages: float = 0.0
    ) -> None:
        self.length = length
        self.seed = seed
        self.size = size
        self.two_objects = two_objects
        self.collages = collages

    def __len__(self) -> int:
        return self.length

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return self.size, self.size

    def original_size(self, index: int) -> tuple[int, int]:
        """The size of an image, which is rendered at that size."""
        return self.size, self.size

    def content(self, index: int) -> str:
        """A key of an image's content."""
        return f"scene {self.seed}/{index} {self.two_objects} {self.collages} of sdmodule {__version__}"

    def view(self, index: int) -> View:
        """The view of an image, which never changes."""
        return View()

    def _scene(self, index: int) -> tuple[random.Random, Scene | None]:
        """The scene of an image, None for a collage, and the generator that paints a collage."""
        rng = random.Random(f"{self.seed}/{index}")
        return rng, None if rng.random() < self.collages else sample_scene(rng, self.two_objects)

    def caption(self, index: int) -> str:
        """The caption of an image; empty for a collage."""
        _, scene = self._scene(index)
        return caption(scene) if scene else ""

    def load(self, index: int, view: View) -> dict[str, Tensor]:
        """An image, ``image`` ``[3, H, W]`` in [-1, 1]."""
        rng, scene = self._scene(index)
        return {"image": image_to_tensor(render(scene, self.size) if scene else render_collage(rng, self.size))}

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        return cast(CaptionedImage, {**self.load(index, self.view(index)), "caption": self.caption(index)})


class ShapesDataModule(TrainingData):
    """Scenes for training and, from another seed, for validation.

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
        super().__init__()
        for name, value in {"batch_size": batch_size, "train_length": train_length, "val_length": val_length}.items():
            check_int(f"data.{name}", value)
        for name, share in {"two_objects": two_objects, "collages": collages}.items():
            check_number(f"data.{name}", share, minimum=0, maximum=1)
        check_workers(num_workers)
        check_seed("data.seed", seed)
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.train_set: Dataset = ShapesDataset(train_length, seed, size, two_objects, collages)
        self.val_set: Dataset = ShapesDataset(val_length, seed + 1, size, two_objects)

    @override
    def train_dataloader(self) -> DataLoader:
        settings = (self.batch_size, self.seed, self.num_workers, self.trainer)
        return training_loader(self.train_set, *settings, earlier=self.resumed_batch_size)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, self.batch_size, num_workers=0, generator=torch.Generator())
