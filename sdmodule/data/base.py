"""What the data modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning import LightningDataModule
from typing_extensions import override


class EarlierBatches(NamedTuple):
    """The batches of a run that another one resumes.

    Attributes:
        global_batch_size: examples in a batch of all devices.
        epoch: the epoch within which that run was itself resumed with batches of another size; -1 if in none.
        first: number of its first batch in that epoch.
        seen: examples of that epoch that were seen before.
    """

    global_batch_size: int
    epoch: int = -1
    first: int = 0
    seen: int = 0

    def seen_after(self, epoch: int, batches: int) -> int:
        """Examples of an epoch that were seen when its batch of a number came next."""
        if epoch != self.epoch:
            return batches * self.global_batch_size
        return self.seen + (batches - self.first) * self.global_batch_size


class TrainingData(LightningDataModule):
    """A data module whose training set can be replaced for a while.

    Attributes:
        train_set: what ``train_dataloader`` draws from.
        earlier: the batches of the run that wrote the checkpoint which training resumes from; None if it does not, or
            the checkpoint does not say.
    """

    train_set: Any = None
    earlier: EarlierBatches | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        loader = self.trainer.train_dataloader if self.trainer else None
        batches: EarlierBatches | None = getattr(getattr(loader, "sampler", None), "as_resumed", None)
        return {} if batches is None else batches._asdict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = {name: state_dict[name] for name in EarlierBatches._fields if name in state_dict}
        self.earlier = EarlierBatches(**known) if known else None

    @contextmanager
    def training_on(self, dataset: Any) -> Iterator[None]:
        """Train on another data set, such as one of cached latents, inside the block."""
        before, self.train_set = self.train_set, dataset
        try:
            yield
        finally:
            self.train_set = before
