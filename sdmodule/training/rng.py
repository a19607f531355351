"""Random numbers of a training: each depends on the seed and the position in training, not on earlier draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Trainer

from sdmodule.training.accumulation import batch_size_of, full_batch_size, validation_loader

Generators = torch.Generator | list[torch.Generator]
"""Source of random numbers: one for a whole batch, or one per example."""


def generator_for(seed: int, *position: int) -> torch.Generator:
    """A generator seeded from ``seed`` and a position in training, such as step and example."""
    digest = hashlib.blake2b(repr((seed, *position)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def per_example_generators(
    seed: int, count: int, batch_idx: int, trainer: Trainer | None, pairs: bool = False
) -> list[torch.Generator]:
    """A generator for each example of a batch, seeded by the example's position within the optimizer step.

    So the draws are the same however the step's examples are spread over devices and accumulated batches.

    Args:
        seed: seed of the training.
        count: examples in the batch.
        batch_idx: index of the batch in its epoch.
        trainer: gives the step, the devices and the accumulation; None is the first step on one device.
        pairs: the batch holds pairs, their first members in its first half; a position is then that of a pair.
    """
    if pairs:
        firsts = per_example_generators(seed, count // 2, batch_idx, trainer)
        return [*firsts, *(generator_for(each.initial_seed(), 1) for each in firsts)]
    if trainer is None:
        return [generator_for(seed, 0, position) for position in range(count)]
    first = batch_idx % trainer.accumulate_grad_batches * full_batch_size(trainer, count)
    positions = [(first + k) * trainer.world_size + trainer.global_rank for k in range(count)]
    return [generator_for(seed, trainer.global_step, position) for position in positions]


@contextmanager
def seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators from ``generator`` inside the block, for layers such as dropout; then restore."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cpu":  # seeding this one alone takes microseconds, seeding all takes milliseconds
            torch.default_generator.manual_seed(generator.initial_seed())
        else:
            torch.manual_seed(generator.initial_seed())
        yield


def validation_generators(
    seed: int, count: int, batch_idx: int, trainer: Trainer | None, dataloader_idx: int = 0
) -> list[torch.Generator]:
    """A generator for each example of a validation batch, seeded by its index in the data: the same at every step.

    Assumes that the data is not shuffled, and that every batch but the last is full.

    Args:
        seed: seed of the training.
        count: examples in the batch.
        batch_idx: index of the batch.
        trainer: gives the size of a full batch, and the devices; None is one device.
        dataloader_idx: which of several loaders gave the batch.
    """
    full = (batch_size_of(validation_loader(trainer, dataloader_idx)) if trainer else None) or count
    devices, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    return [generator_for(seed, 0, (batch_idx * full + k) * devices + rank) for k in range(count)]
