"""Tensors of the host on a device, all of them by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

Tensors = TypeVar("Tensors")
"""Tensors in tuples, lists and mappings."""

ALIGNMENT = 64
"""Bytes of which each tensor starts at a multiple."""


def upload_together(tensors: Tensors, device: torch.device) -> Tensors:
    """The same on a device.

    To a GPU all tensors are copied at once, from pinned memory, and neither the host nor the GPU waits: not for each of
    them, and not for what the GPU still has to do.
    """
    if device.type != "cuda":
        return apply_to_collection(tensors, Tensor, lambda one: one.to(device))
    found: list[Tensor] = []
    apply_to_collection(tensors, Tensor, found.append)
    there = iter(_copied(found, device))
    return apply_to_collection(tensors, Tensor, lambda _: next(there))


def _copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    sizes = [-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in tensors]
    starts = [0, *accumulate(sizes)]
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for one, place in zip(tensors, _places(host, tensors, starts), strict=True):
        place.copy_(one)
    return _places(host.to(device, non_blocking=True), tensors, starts)


def _places(memory: Tensor, tensors: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    """Where each tensor lies in a memory of bytes."""
    found = zip(tensors, starts, strict=False)
    return [memory[start : start + one.nbytes].view(one.dtype).view(one.shape) for one, start in found]
