"""What the data modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningDataModule


class TrainingData(LightningDataModule):
    """A data module whose training set can be replaced for a while.

    Attributes:
        train_set: what ``train_dataloader`` draws from.
    """

    train_set: Any = None

    @contextmanager
    def training_on(self, dataset: Any) -> Iterator[None]:
        """Train on another data set, such as one of cached latents, inside the block."""
        before, self.train_set = self.train_set, dataset
        try:
            yield
        finally:
            self.train_set = before
