"""The order of training examples."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler
from typing_extensions import override


class ShuffleByEpoch(DistributedSampler[Any]):
    """Shuffles by (seed, epoch), over one device or many, and tells the data the epoch if it wants to know."""

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
