"""Which samples of a streamed set each device is given, and where in an epoch a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from sdmodule.data.streaming.index import Samples
from sdmodule.data.streaming.order import EpochOrder
from sdmodule.data.worker_processes import loading_options
from sdmodule.training.loop_state import renumber_batches, resumed_batch


@dataclass(frozen=True)
class Segment:
    """A part of an epoch whose batches have one size.

    Attributes:
        epoch: number of the epoch.
        batch_size: samples in a batch of all devices.
        start: of each group, how many samples the epoch had shown before; None at its start.
        number: number that the first batch of the segment has in the epoch.
    """

    epoch: int
    batch_size: int
    start: tuple[int, ...] | None = None
    number: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Segment:
        """A segment from what a checkpoint holds of it."""
        start = state["start"]
        return cls(state["epoch"], state["batch_size"], None if start is None else tuple(start), state["number"])


class StreamSampler(DistributedSampler[Any]):
    """Global batches in the order of `EpochOrder`; example k of one goes to device ``k % devices``.

    It is a ``DistributedSampler`` because Lightning replaces samplers of any other kind by its own.

    Args:
        data: the examples; its ``set_epoch``, if it has one, is called with each new epoch.
        samples: where they are.
        batch_size: examples per batch on each device.
        devices: number of devices.
        rank: rank of this device.
        seed: seed of the order.
        window: number of shards whose samples are shuffled together.
        ahead: is told, before they are read, the positions in ``samples`` of the shards that are read next.

    Attributes:
        global_batch_size: examples per batch over all devices.
        batches: batches per epoch.
        segment: what is left of the epoch that a run was resumed in.
        skip: batches of that segment that were seen before.
    """

    skip = 0

    def __init__(
        self,
        data: Dataset[Any],
        samples: Samples,
        batch_size: int,
        devices: int = 1,
        rank: int = 0,
        seed: int = 0,
        window: int = 4,
        ahead: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        super().__init__(data, devices, rank, seed=seed)
        self.samples = samples
        self.window = window
        self.ahead = ahead
        self.global_batch_size = batch_size * devices
        if not samples.bucketed:  # too few for a batch are one batch; some repeat where devices' parts would differ
            self.global_batch_size = min(self.global_batch_size, -(-len(samples) // devices) * devices)
        self.segment = Segment(0, self.global_batch_size)
        self.batches = self.order(self.segment).batches

    def __len__(self) -> int:
        return self.batches * self.global_batch_size // self.num_replicas

    def order(self, segment: Segment) -> EpochOrder:
        """The batches of a segment."""
        sizes = (self.window, segment.batch_size, self.num_replicas)
        return EpochOrder(self.samples, self.seed, segment.epoch, *sizes, segment.start)

    @override
    def __iter__(self) -> Iterator[int]:
        own = self.segment.epoch == self.epoch
        order = self.order(self.segment if own else Segment(self.epoch, self.global_batch_size))
        skip, self.skip = self.skip if own else 0, 0
        asked: set[tuple[int, int]] = set()
        for number in range(skip, order.batches):
            if self.ahead is not None:
                for group, window in order.upcoming(number):
                    if (group, window) not in asked:
                        asked.add((group, window))
                        self.ahead(order.groups[group].shards_of(window))
            yield from order.batch(number)[self.rank :: self.num_replicas]

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, beside the number of batches done, to continue in mid-epoch."""
        return asdict(self.segment)

    def resume(self, epoch: int, done: int, state: Mapping[str, Any] | None, accumulate: int = 1) -> int:
        """Continue in mid-epoch, with any number of devices and any size of batches.

        What is left of the epoch is numbered so that it ends where an epoch ends, in whole windows of accumulation.

        Args:
            epoch: number of the epoch.
            done: number of its batches that a checkpoint counts as done.
            state: what `state` gave when the checkpoint was written; None if it is not known.
            accumulate: batches per optimizer step.

        Returns:
            The number of batches that are to count as done.
        """
        self.set_epoch(epoch)
        before = Segment(epoch, self.global_batch_size) if state is None else Segment.of(state)
        if before.epoch != epoch:  # it was finished
            before = Segment(epoch, before.batch_size)
        order = self.order(before)
        shown = min(max(0, done - before.number), order.batches)
        if before.batch_size == self.global_batch_size:
            self.segment, self.skip = before, shown % max(1, order.batches)
            return done
        if not shown and before.start is None:
            self.segment = Segment(epoch, self.global_batch_size)
            return 0
        start = order.shown(shown)
        left = self.order(Segment(epoch, self.global_batch_size, start)).batches
        number = max(0, self.batches - left) // accumulate * accumulate
        self.segment = Segment(epoch, self.global_batch_size, start, number)
        return number


def stream_loader(
    data: Dataset[Any],
    samples: Samples,
    batch_size: int,
    seed: int,
    workers: int | None,
    trainer: Trainer | None,
    window: int,
    ahead: Callable[[np.ndarray], None] | None = None,
    collate: Callable[[Any], Any] | None = None,
    state: Mapping[str, Any] | None = None,
) -> DataLoader:
    """A loader of shuffled batches; a run that is resumed mid-epoch continues after the last sample it has seen.

    Args:
        data: the examples, found by the numbers of the samples.
        samples: where they are.
        batch_size: examples per batch on each device.
        seed: seed of the order.
        workers: number of worker processes; None is by device, see `loading_options`.
        trainer: gives the number of devices and the progress of training.
        window: number of shards whose samples are shuffled together.
        ahead: see `StreamSampler`.
        collate: makes a batch of examples; None for torch's default.
        state: of the checkpoint that the run is resumed from; see `StreamSampler.state`.
    """
    devices, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    sampler = StreamSampler(data, samples, batch_size, devices, rank, seed, window, ahead)
    # workers prefetch before the trainer first sets the epoch: a resumed run must not start with epoch 0
    sampler.set_epoch(trainer.current_epoch if trainer else 0)
    device_batch_size = sampler.global_batch_size // devices
    if device_batch_size < batch_size:
        rank_zero_warn(
            f"data.batch_size={batch_size}: there are only {len(samples)} training images, so the batch size is "
            f"{device_batch_size}."
        )
    if trainer and (done := resumed_batch(trainer)) is not None:
        number = sampler.resume(trainer.current_epoch, done, state, trainer.accumulate_grad_batches)
        if number != done:
            renumber_batches(trainer, number)
    options = loading_options(workers, trainer, sampler.batches)
    return DataLoader(
        data,
        batch_size=device_batch_size,
        sampler=sampler,
        collate_fn=collate,
        persistent_workers=options["num_workers"] > 0,
        **options,
        # without its own generator, the loader would advance the global RNG
        generator=torch.Generator().manual_seed(seed),
    )
