"""The order of training examples, and the place in it where a training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from lightning import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override


class ShuffleByEpoch(DistributedSampler[Any]):
    """Shuffles by (seed, epoch), over one device or many, and tells the data the epoch if it wants to know.

    Attributes:
        skip: examples of the first epoch that were seen before the training was stopped.
    """

    skip = 0

    @override
    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def training_loader(
    data: Dataset[Any], batch_size: int, seed: int, workers: int, trainer: Trainer | None
) -> DataLoader:
    """Batches of shuffled examples; a training that goes on within an epoch goes on behind its last batch.

    Args:
        data: the examples; if they are fewer than a batch, that is the batch.
        batch_size: examples a batch on each device.
        seed: names the order.
        workers: processes that load; 0 loads in the training process.
        trainer: tells the devices and where the training stands.
    """
    world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    sampler = ShuffleByEpoch(data, world_size, rank, seed=seed)
    # workers read ahead before the trainer first sets the epoch: a resumed run must not start with epoch 0
    sampler.set_epoch(trainer.current_epoch if trainer else 0)
    loader = DataLoader(
        data,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        # without its own generator the loader would draw from the global random numbers
        generator=torch.Generator().manual_seed(seed),
    )
    if trainer and trainer.fit_loop.restarting:
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        sampler.skip = seen % len(loader) * batch_size
    return loader
