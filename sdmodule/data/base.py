"""What the data modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningDataModule
from typing_extensions import override


class TrainingData(LightningDataModule):
    """A data module whose training set can be replaced for a while.

    Attributes:
        train_set: what ``train_dataloader`` draws from.
        resumed_batch_size: examples in a batch of all devices when the checkpoint was written that training resumes
            from; None if it does not, or the checkpoint does not say.
    """

    train_set: Any = None
    resumed_batch_size: int | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        loader = self.trainer.train_dataloader if self.trainer else None
        size = getattr(getattr(loader, "sampler", None), "global_batch_size", None)
        return {} if size is None else {"global_batch_size": size}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resumed_batch_size = state_dict.get("global_batch_size")

    @contextmanager
    def training_on(self, dataset: Any) -> Iterator[None]:
        """Train on another data set, such as one of cached latents, inside the block."""
        before, self.train_set = self.train_set, dataset
        try:
            yield
        finally:
            self.train_set = before
