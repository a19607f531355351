"""The order of training examples, and where in it a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from sdmodule.data.base import EarlierBatches
from sdmodule.data.worker_processes import loading_options
from sdmodule.errors import MAX_SEED
from sdmodule.training.loop_state import renumber_batches, resumed_batch

Groups = Sequence[Sequence[int] | NDArray[np.int64]]
"""Indices of the examples of each group."""


class ShuffleByEpoch(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) into global batches, and gives each device its part of every batch.

    The examples of a global batch all come from one group. The order does not depend on the number of devices:
    example k of a global batch goes to device ``k % devices``.

    The last batch of a group is filled up with examples of that group which the epoch has already shown. With a
    single group, the rest is dropped instead: another epoch's order shows it.

    It is a ``DistributedSampler`` because Lightning replaces samplers of any other kind by its own.

    Args:
        data: the examples; its ``set_epoch``, if it has one, is called with each new epoch.
        batch_size: examples per batch on each device.
        devices: number of devices.
        rank: rank of this device.
        seed: seed of the order.
        groups: indices of examples that may share a batch; None for a single group of all.

    Attributes:
        global_batch_size: examples per batch over all devices.
        batches: batches per epoch.
        skip: batches of the first epoch that a resumed run has already seen.
        seen: examples of the first epoch that it has seen, partly in batches of another size, instead of ``skip``.
        resumed: where in an epoch batches of another size were followed by these.
    """

    skip = 0
    seen = 0
    resumed = EarlierBatches(0)

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        devices: int = 1,
        rank: int = 0,
        seed: int = 0,
        groups: Groups | None = None,
    ) -> None:
        super().__init__(data, devices, rank, seed=seed)
        count = len(data)  # type: ignore[arg-type]
        self.groups = None if groups is None else [torch.as_tensor(group, dtype=torch.int64) for group in groups]
        self.global_batch_size = batch_size * devices
        if groups is None:  # too few for a batch are one batch; some repeat where devices' parts would differ
            self.global_batch_size = min(self.global_batch_size, -(-count // devices) * devices)
            self.batches = max(1, count // self.global_batch_size)
        else:
            self.batches = sum(-(-len(group) // self.global_batch_size) for group in groups)

    def __len__(self) -> int:
        return self.batches * self.global_batch_size // self.num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed + self.epoch) % (MAX_SEED + 1))
        skip, self.skip, seen, self.seen = self.skip, 0, self.seen, 0
        for batch in islice(self._global_batches(generator, seen), skip, None):
            yield from batch[self.rank :: self.num_replicas]

    @property
    def as_resumed(self) -> EarlierBatches:
        """These batches as a run sees them that is resumed."""
        return self.resumed._replace(global_batch_size=self.global_batch_size)

    def batches_after(self, seen: int) -> int:
        """Batches that are left of an epoch of which ``seen`` examples were shown in batches of another size."""
        left = len(self.dataset) - seen  # type: ignore[arg-type]
        whole, rest = divmod(left, self.global_batch_size)
        return min(whole + (rest >= self.num_replicas), self.batches)

    def _global_batches(self, generator: torch.Generator, seen: int = 0) -> Iterator[list[int]]:
        size = self.global_batch_size
        if self.groups is None:
            order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
            if not seen:
                yield from (_chunk(order, start, size) for start in range(0, self.batches * size, size))
                return
            for start in range(seen, len(order), size)[: self.batches_after(seen)]:
                batch = order[start : start + size].tolist()
                yield batch[: len(batch) // self.num_replicas * self.num_replicas]
            return
        orders = [group[torch.randperm(len(group), generator=generator)] for group in self.groups]
        counts = torch.tensor([-(-len(order) // size) for order in orders])
        first = counts.cumsum(0) - counts  # batch of each group
        for batch in torch.randperm(self.batches, generator=generator):
            number = int(torch.searchsorted(first + counts, batch, right=True))
            yield _chunk(orders[number], int(batch - first[number]) * size, size)

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _chunk(order: torch.Tensor, start: int, size: int) -> list[int]:
    """A part of an order, filled up from its start, repeatedly if need be."""
    part = order[start : start + size]
    if len(part) == size:
        return part.tolist()
    return order[torch.arange(start, start + size) % len(order)].tolist()


def training_loader(
    data: Dataset[Any],
    batch_size: int,
    seed: int,
    workers: int | None,
    trainer: Trainer | None,
    groups: Groups | None = None,
    collate: Callable[[Sequence[Any]], Any] | None = None,
    earlier: EarlierBatches | None = None,
) -> DataLoader:
    """A loader of shuffled batches; a run that is resumed mid-epoch continues after the last example it has seen.

    Args:
        data: the examples; if they are fewer than a batch, the batch is smaller.
        batch_size: examples per batch on each device.
        seed: seed of the order.
        workers: number of worker processes; 0 loads in the training process; None is by device, see `loading_options`.
        trainer: gives the number of devices and the progress of training.
        groups: indices of examples that may share a batch; None for a single group of all.
        collate: makes a batch of examples; None for torch's default.
        earlier: batches before the run was resumed; None if they are not known.
    """
    devices, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    sampler = ShuffleByEpoch(data, batch_size, devices, rank, seed, groups)
    # workers prefetch before the trainer first sets the epoch: a resumed run must not start with epoch 0
    sampler.set_epoch(trainer.current_epoch if trainer else 0)
    device_batch_size = sampler.global_batch_size // devices
    if device_batch_size < batch_size:
        count = len(data)  # type: ignore[arg-type]
        rank_zero_warn(
            f"data.batch_size={batch_size}: there are only {count} training images, so the batch size is "
            f"{device_batch_size}."
        )
    options = loading_options(workers, trainer, sampler.batches)
    loader = DataLoader(
        data,
        batch_size=device_batch_size,
        sampler=sampler,
        collate_fn=collate,
        persistent_workers=options["num_workers"] > 0,
        **options,
        # without its own generator, the loader would advance the global RNG
        generator=torch.Generator().manual_seed(seed),
    )
    if trainer and (done := resumed_batch(trainer)) is not None:
        _continue_epoch(sampler, trainer, done, earlier)
    return loader


def _continue_epoch(sampler: ShuffleByEpoch, trainer: Trainer, done: int, earlier: EarlierBatches | None) -> None:
    """Continue an epoch behind the batches that are done, whatever their size was.

    The rest of the epoch is numbered so that it ends where an epoch ends, in whole windows of accumulation.
    """
    size, epoch = sampler.global_batch_size, trainer.current_epoch
    seen = done * size if earlier is None else earlier.seen_after(epoch, done)
    if earlier is None or (earlier.global_batch_size == size and seen == done * size):
        sampler.skip = done % sampler.batches
        left = sampler.batches - sampler.skip
    elif sampler.groups is not None:
        seen, left = 0, sampler.batches
        rank_zero_warn(
            f"data.batch_size: was {earlier.global_batch_size} images over all devices, and is {size}; with "
            "data.buckets the batches of an epoch are then others, so this epoch starts over."
        )
    else:
        sampler.seen = seen
        left = sampler.batches_after(seen)
    window = trainer.accumulate_grad_batches
    number = (sampler.batches - left) // window * window
    if number != done % sampler.batches:
        renumber_batches(trainer, number)
    if not sampler.skip and done % sampler.batches:
        sampler.resumed = EarlierBatches(size, epoch, number, seen)
