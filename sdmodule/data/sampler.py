"""The order of training examples, and the place in it where a training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override


class ShuffleByEpoch(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) into batches over all devices, and gives each device its part of every batch.

    Each batch over all devices is of one group of examples, and every device has equally many of it. The order does
    not depend on the number of devices: example k of a batch goes to device ``k % devices``.

    What is left of a group at the end of an epoch is filled up to a batch with examples of the group that the epoch
    has shown already; where there is but one group it waits for another epoch's order instead.

    It is a ``DistributedSampler`` since Lightning puts one of its own in the place of any other kind.

    Args:
        data: the examples; told the epoch if they have a method for it.
        batch_size: examples a batch on each device.
        devices: how many.
        rank: of this one.
        seed: names the order.
        groups: indices of examples that may be in one batch; all of them if None.

    Attributes:
        together: examples a batch over all devices.
        batches: of an epoch.
        skip: batches of the first epoch that were seen before the training was stopped.
    """

    skip = 0

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        devices: int = 1,
        rank: int = 0,
        seed: int = 0,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(data, devices, rank, seed=seed)
        count = len(data)  # type: ignore[arg-type]
        self.groups = groups
        self.together = batch_size * devices
        if groups is None:  # too few for a batch are one, some repeated where the devices' parts would differ
            self.together = min(self.together, -(-count // devices) * devices)
            self.batches = max(1, count // self.together)
        else:
            self.batches = sum(-(-len(group) // self.together) for group in groups)

    def __len__(self) -> int:
        return self.batches * self.together // self.num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        skip, self.skip = self.skip, 0
        for batch in islice(self._together(generator), skip, None):
            yield from batch[self.rank :: self.num_replicas]

    def _together(self, generator: torch.Generator) -> Iterator[list[int]]:
        """The epoch's batches over all devices."""
        if self.groups is None:
            order = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
            yield from islice(_cut(order, self.together), self.batches)
            return
        orders = [[group[k] for k in torch.randperm(len(group), generator=generator)] for group in self.groups]
        batches = [batch for order in orders for batch in _cut(order, self.together)]
        yield from (batches[k] for k in torch.randperm(len(batches), generator=generator).tolist())

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _cut(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Batches of one size; the last is filled up from the beginning, as often as it takes."""
    for start in range(0, len(order), size):
        yield [order[position % len(order)] for position in range(start, start + size)]


def training_loader(
    data: Dataset[Any],
    batch_size: int,
    seed: int,
    workers: int,
    trainer: Trainer | None,
    groups: Sequence[Sequence[int]] | None = None,
    collate: Callable[[Sequence[Any]], Any] | None = None,
) -> DataLoader:
    """Batches of shuffled examples; a training that goes on within an epoch goes on behind its last batch.

    Args:
        data: the examples; if they are fewer than a batch, that is the batch.
        batch_size: examples a batch on each device.
        seed: names the order.
        workers: processes that load; 0 loads in the training process.
        trainer: tells the devices and where the training stands.
        groups: indices of examples that may be in one batch; all of them if None.
        collate: makes a batch of examples; torch's own if None.
    """
    devices, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    sampler = ShuffleByEpoch(data, batch_size, devices, rank, seed, groups)
    # workers read ahead before the trainer first sets the epoch: a resumed run must not start with epoch 0
    sampler.set_epoch(trainer.current_epoch if trainer else 0)
    if sampler.together < batch_size * devices:
        count, together = len(data), sampler.together // devices  # type: ignore[arg-type]
        rank_zero_warn(
            f"data.batch_size={batch_size}: there are {count} images to train on, so a batch is of {together}."
        )
    loader = DataLoader(
        data,
        batch_size=sampler.together // devices,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        # without its own generator the loader would draw from the global random numbers
        generator=torch.Generator().manual_seed(seed),
    )
    if trainer and trainer.fit_loop.restarting:
        sampler.skip = trainer.fit_loop.epoch_loop.batch_progress.current.ready % sampler.batches
    return loader
