"""What `TimingLogger` computes from a run: medians, lengths, memory, and values of all devices."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning import Trainer


def on_all_devices(own: Any, trainer: Trainer) -> list[Any]:
    """A value of this device and of all others, in the order of ranks; every device must ask for it."""
    if trainer.world_size == 1:
        return [own]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, own)
    return values


def median_and_p95(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    if not seconds:
        return {}
    return {"median": float(np.median(seconds)), "p95": float(np.percentile(seconds, 95))}


def flatten(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each figure; the names of nested ones are joined by underscores."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{inner}", number) for inner, number in flatten(value))
        else:
            yield name, value


def batch_length(batch: Any) -> int:
    """Number of examples in a batch: the length of its first entry."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) and batch else batch
    return len(first)


def slowest(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each time, that of the device where it is longest."""
    names = dict.fromkeys(name for one in times for name in one)
    return {name: max(one[name] for one in times if name in one) for name in names}


def reset_peak_memory(device: torch.device) -> None:
    """Forget the GPU's peak of earlier runs in this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU since `reset_peak_memory`, or resident on the CPU so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
