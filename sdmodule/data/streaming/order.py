"""The order of the samples of a streamed set: a function of (seed, epoch) alone, of which any batch is known at once.

Shards are permuted, and samples are shuffled within windows of a few shards, so that these are read together and only
they must lie on local disk. With buckets each has an order of its own, and their batches alternate by their numbers.
Nothing here grows with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch

from sdmodule.data.streaming.index import Samples
from sdmodule.io.fingerprint import fingerprint

BLOCK = 256
"""Batches, about, within which those of the buckets are shuffled."""


class GroupOrder:
    """The samples of one group in the order of an epoch.

    Args:
        samples: all samples.
        group: positions of the group's shards in them.
        window: number of shards whose samples are shuffled together.
        key: what the order is drawn from.
    """

    def __init__(self, samples: Samples, group: np.ndarray, window: int, key: str) -> None:
        self.samples = samples
        self.window = window
        self.key = key
        self.shards = group[_permutation(len(group), key, "shards")]
        counts = [int(samples.counts[self.shards[k : k + window]].sum()) for k in range(0, len(self.shards), window)]
        self.starts = np.array([0, *accumulate(counts)], dtype=np.int64)
        self.shuffled = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def window_of(self, place: int) -> int:
        """The window of a place in the order."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def shards_of(self, window: int) -> np.ndarray:
        """Positions of the shards of a window; empty behind the last one."""
        return self.shards[window * self.window : (window + 1) * self.window]

    def _shuffled(self, window: int) -> np.ndarray:
        """Numbers of the samples of a window."""
        offsets = self.samples.offsets
        numbers = np.concatenate([np.arange(offsets[k], offsets[k + 1]) for k in self.shards_of(window)])
        return numbers[_permutation(len(numbers), self.key, window)]

    def __getitem__(self, place: int) -> int:
        window = self.window_of(place)
        return int(self.shuffled(window)[place - self.starts[window]])


class EpochOrder:
    """The batches of an epoch, or of the rest of one.

    The last batch of a bucket is filled up with samples of that bucket which the epoch has already shown. Without
    buckets, the samples that fill no batch are left out, unless they are the end of an epoch that was continued with
    another size of batches.

    Args:
        samples: what is shown.
        seed: seed of the order.
        epoch: number of the epoch.
        window: number of shards whose samples are shuffled together.
        batch_size: samples in a batch of all devices.
        devices: number of devices, which share each batch.
        start: of each group, how many samples were shown before; None at the start of an epoch.

    Attributes:
        batches: number of batches.
    """

    def __init__(
        self,
        samples: Samples,
        seed: int,
        epoch: int,
        window: int,
        batch_size: int,
        devices: int = 1,
        start: Sequence[int] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.devices = devices
        self.bucketed = samples.bucketed
        self.key = fingerprint(seed, epoch)
        self.groups = [GroupOrder(samples, g, window, f"{self.key} {k}") for k, g in enumerate(samples.groups)]
        self.start = tuple(start or (0 for _ in self.groups))
        self.left = [len(group) - shown for group, shown in zip(self.groups, self.start, strict=True)]
        if self.bucketed:
            self.counts = [-(-left // batch_size) for left in self.left]
        else:
            whole, rest = divmod(self.left[0], batch_size)
            ends = start is not None and rest >= devices
            self.counts = [max(whole + ends, int(start is None))]
        self.batches = sum(self.counts)

    def batch(self, number: int) -> list[int]:
        """Numbers of the samples of a batch; example k is for device ``k % devices``."""
        group, position = self._find(number)
        order, first = self.groups[group], self.start[group] + position * self.batch_size
        last = min(first + self.batch_size, len(order))
        places = list(range(first, last))
        missing = self.batch_size - len(places)
        if missing and any(self.start) and not self.bucketed:
            return [order[place] for place in places[: len(places) // self.devices * self.devices]]
        return [order[place % len(order)] for place in (*places, *range(missing))]

    def shown(self, number: int) -> tuple[int, ...]:
        """Of each group, how many samples the epoch has shown before a batch."""
        done = self._before(number)
        return tuple(
            shown + min(count * self.batch_size, left)
            for shown, count, left in zip(self.start, done, self.left, strict=True)
        )

    def upcoming(self, number: int, ahead: int = 1) -> list[tuple[int, int]]:
        """Of each group that has samples left, the group and the window it is in before a batch, and ``ahead`` more."""
        found = []
        for k, (group, shown) in enumerate(zip(self.groups, self.shown(number), strict=True)):
            if shown < len(group):
                first = group.window_of(shown)
                found += [(k, window) for window in range(first, first + ahead + 1) if len(group.shards_of(window))]
        return found

    @cached_property
    def _blocks(self) -> int:
        return max(1, self.batches // BLOCK)

    def _up_to(self, block: int) -> list[int]:
        """Batches of each group in the blocks before one."""
        return [count * block // self._blocks for count in self.counts]

    def _block_of(self, number: int) -> int:
        block = min(number * self._blocks // max(1, self.batches), self._blocks - 1)
        while block + 1 < self._blocks and sum(self._up_to(block + 1)) <= number:
            block += 1
        return block

    @cached_property
    def _sequence(self) -> Callable[[int], np.ndarray]:
        @lru_cache(maxsize=2)
        def sequence(block: int) -> np.ndarray:
            """The groups of the batches of a block."""
            before, behind = self._up_to(block), self._up_to(block + 1)
            own = np.repeat(np.arange(len(before)), np.subtract(behind, before))
            return own[_permutation(len(own), self.key, self.start, self.batch_size, block)]

        return sequence

    def _before(self, number: int) -> list[int]:
        """Batches of each group before a batch."""
        if len(self.groups) == 1:
            return [number]
        block = self._block_of(number)
        before = self._up_to(block)
        within = self._sequence(block)[: number - sum(before)]
        return [count + int((within == k).sum()) for k, count in enumerate(before)]

    def _find(self, number: int) -> tuple[int, int]:
        """The group of a batch, and its number among the group's."""
        if len(self.groups) == 1:
            return 0, number
        block = self._block_of(number)
        group = int(self._sequence(block)[number - sum(self._up_to(block))])
        return group, self._before(number)[group]


def _permutation(count: int, *key: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(int(fingerprint(*key)[:15], 16))
    return torch.randperm(count, generator=generator).numpy()
