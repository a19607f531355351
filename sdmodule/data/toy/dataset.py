"""Captioned images of coloured shapes, made on the fly: the data that the embedded model is trained on."""

from __future__ import annotations

import random
from typing import NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.data.base import TrainingData
from sdmodule.data.sampler import training_loader
from sdmodule.data.toy.scenes import Scene, caption, render, render_collage, sample_scene
from sdmodule.io.images import image_to_tensor
from sdmodule.version import __version__


class CaptionedImage(TypedDict):
    """One training example: ``image`` is ``[3, H, W]`` in [-1, 1].

    ``mask``, if any, is ``[1, H, W]`` of 1 and 0; ``conditioning``, a ControlNet's image, ``[3, H, W]`` in [0, 1].
    """

    image: Tensor
    caption: str
    mask: NotRequired[Tensor]
    conditioning: NotRequired[Tensor]


class View(NamedTuple):
    """How an image is shown: which part of it is cut out, from 0 to 1 each way, and whether it is mirrored."""

    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False


class ShapesDataset(Dataset[CaptionedImage]):
    """``length`` scenes; scene k depends on (seed, k) alone, whatever the order or the number of workers.

    Args:
        length: number of images.
        seed: names the sequence of scenes.
        size: side of an image in pixels.
        two_objects: share of scenes with two objects.
        collages: share of images without a caption that show anything but the grammar's shapes; for autoencoders.
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

    def content(self, index: int) -> str:
        """Names what an image shows."""
        return f"scene {self.seed}/{index} {self.two_objects} {self.collages} of sdmodule {__version__}"

    def view(self, index: int) -> View:
        """How an image is shown: always in the same way."""
        return View()

    def _scene(self, index: int) -> tuple[random.Random, Scene | None]:
        """The scene that an image shows; none for a collage, which is painted with the generator beside it."""
        rng = random.Random(f"{self.seed}/{index}")
        return rng, None if rng.random() < self.collages else sample_scene(rng, self.two_objects)

    def caption(self, index: int) -> str:
        """What an image shows; a collage has no caption."""
        _, scene = self._scene(index)
        return caption(scene) if scene else ""

    def seen(self, index: int, view: View) -> dict[str, Tensor]:
        """An image, ``image`` ``[3, H, W]``."""
        rng, scene = self._scene(index)
        return {"image": image_to_tensor(render(scene, self.size) if scene else render_collage(rng, self.size))}

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        return cast(CaptionedImage, {**self.seen(index, self.view(index)), "caption": self.caption(index)})


class ShapesDataModule(TrainingData):
    """Scenes for training and, from another seed, for validation.

    Args:
        batch_size: images a step.
        train_length: images in an epoch of training.
        val_length: images for validation.
        size: side of an image in pixels.
        two_objects: share of scenes with two objects.
        collages: share of caption-less images in training, for autoencoders.
        seed: names the sequence of scenes.
        num_workers: processes that render; 0 renders in the training process.
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
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.train_set: Dataset = ShapesDataset(train_length, seed, size, two_objects, collages)
        self.val_set: Dataset = ShapesDataset(val_length, seed + 1, size, two_objects)

    @override
    def train_dataloader(self) -> DataLoader:
        return training_loader(self.train_set, self.batch_size, self.seed, self.num_workers, self.trainer)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, self.batch_size, num_workers=0, generator=torch.Generator())
