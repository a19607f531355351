"""Batch sizes of compiled code: each size compiles anew, so a smaller batch is padded to a size that is there."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

PATIENCE = 8
"""Batches of one size that are padded before code is compiled for it: a run has one such batch, its last."""

Shape = tuple[int, int, int]
"""Shape ``(C, h, w)`` of one image's latents."""


class BatchSizes:
    """The batch sizes that code was compiled for, by the shape of the latents.

    Attributes:
        active: whether that code is in use.
    """

    def __init__(self) -> None:
        self.active = False
        self._compiled: defaultdict[Shape, set[int]] = defaultdict(set)
        self._padded: Counter[tuple[Shape, int]] = Counter()

    def rows(self, shape: Shape, count: int) -> int:
        """Rows to compute for ``count`` images: as many as in the smallest larger batch, or ``count``."""
        sizes = self._compiled[shape]
        larger = [size for size in sizes if size >= count]
        if count not in sizes and larger and self._padded[shape, count] < PATIENCE:
            self._padded[shape, count] += 1
            return min(larger)
        sizes.add(count)
        return count


_sizes: WeakKeyDictionary[nn.Module, BatchSizes] = WeakKeyDictionary()


@contextmanager
def padding_batches(unet: nn.Module) -> Iterator[None]:
    """Let `rows_to_compute` pad the batches of a UNet inside a ``with`` block; sizes are remembered for the next."""
    sizes = _sizes.setdefault(unet, BatchSizes())
    sizes.active = True
    try:
        yield
    finally:
        sizes.active = False


def rows_to_compute(unet: nn.Module, shape: Shape, count: int) -> int:
    """Rows of the batch in which ``count`` images are denoised: more than ``count`` if a compiled UNet pads it.

    Args:
        unet: the denoiser.
        shape: of one image's latents.
        count: number of images.
    """
    sizes = _sizes.get(unet)
    return count if sizes is None or not sizes.active else sizes.rows(shape, count)
