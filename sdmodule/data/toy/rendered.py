"""Captioned images that are rendered on the fly."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.data.base import TrainingData
from sdmodule.data.example import CaptionedImage, View
from sdmodule.data.sampler import training_loader
from sdmodule.data.worker_processes import check_workers
from sdmodule.errors import check_int, check_number, check_seed
from sdmodule.io.images import image_to_tensor


class RenderedDataset(Dataset[CaptionedImage]):
    """``length`` images rendered on the fly; image k depends on (seed, k) alone, not on the order or the workers.

    Args:
        length: number of images.
        seed: seed of the scenes.
        size: side of an image in pixels.
    """

    center_crop, random_flip, fixed_captions = True, False, True

    def __init__(self, length: int, seed: int = 0, size: int = 64) -> None:
        self.length = length
        self.seed = seed
        self.size = size

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[str, Callable[[], Image.Image]]:
        """Draw the caption of an image, and what renders it."""

    @abstractmethod
    def content(self, index: int) -> str:
        """A key of an image's content."""

    def __len__(self) -> int:
        return self.length

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return self.size, self.size

    def original_size(self, index: int) -> tuple[int, int]:
        """The size of an image, which is rendered at that size."""
        return self.size, self.size

    def view(self, index: int) -> View:
        """The view of an image, which never changes."""
        return View()

    def caption(self, index: int) -> str:
        """The caption of an image; empty for a collage."""
        return self.draw(self._rng(index))[0]

    def load(self, index: int, view: View) -> dict[str, Tensor]:
        """An image, ``image`` ``[3, H, W]`` in [-1, 1]."""
        return {"image": image_to_tensor(self.draw(self._rng(index))[1]())}

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"{self.seed}/{index}")

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        return cast(CaptionedImage, {**self.load(index, self.view(index)), "caption": self.caption(index)})


class RenderedDataModule(TrainingData):
    """Rendered images for training and validation.

    Args:
        train_set: the training images.
        val_set: the validation images.
        batch_size: images per batch.
        seed: seed of the order.
        num_workers: processes that render; 0 renders in the training's own; None is by device, see `loading_options`.

    Raises:
        SettingsError: for a value out of range.
    """

    def __init__(
        self, train_set: Dataset, val_set: Dataset, batch_size: int, seed: int, num_workers: int | None
    ) -> None:
        super().__init__()
        check_workers(num_workers)
        self.train_set = train_set
        self.val_set = val_set
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    @override
    def train_dataloader(self) -> DataLoader:
        settings = (self.batch_size, self.seed, self.num_workers, self.trainer)
        return training_loader(self.train_set, *settings, earlier=self.earlier)

    @override
    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, self.batch_size, num_workers=0, generator=torch.Generator())


def check_counts(seed: int, **counts: int) -> None:
    """Check settings that count something, and a seed.

    Raises:
        SettingsError: if one is out of range.
    """
    for name, value in counts.items():
        check_int(f"data.{name}", value)
    check_seed("data.seed", seed)


def check_shares(**shares: float) -> None:
    """Check settings that are shares of something.

    Raises:
        SettingsError: if one is not from 0 to 1.
    """
    for name, share in shares.items():
        check_number(f"data.{name}", share, minimum=0, maximum=1)
