"""Random numbers that depend on where in a training they are drawn, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Trainer

Generators = torch.Generator | list[torch.Generator]
"""Source of random numbers: one for a whole batch, or one for each of its examples."""


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A generator for one place of the training that ``seed`` names."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def per_example_generators(
    seed: int, count: int, batch_idx: int, trainer: Trainer | None, pairs: bool = False
) -> list[torch.Generator]:
    """A generator for each example of a batch, by its place among all that the optimizer's step is made of.

    So the draws are the same however a step's examples are spread over devices and accumulated batches.

    Args:
        seed: names the training.
        count: examples in the batch.
        batch_idx: of the batch, in its epoch.
        trainer: tells the step, the devices and the accumulation; None is the first step of one device.
        pairs: the batch is of pairs, the first of each in its first half: places are then those of pairs.
    """
    if pairs:
        firsts = per_example_generators(seed, count // 2, batch_idx, trainer)
        return [*firsts, *(generator_for(each.initial_seed(), 1) for each in firsts)]
    if trainer is None:
        return [generator_for(seed, 0, place) for place in range(count)]
    first = batch_idx % trainer.accumulate_grad_batches * count
    places = [(first + k) * trainer.world_size + trainer.global_rank for k in range(count)]
    return [generator_for(seed, trainer.global_step, place) for place in places]


@contextmanager
def seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Draw from ``generator`` what layers such as dropout draw from torch's own; that is as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cpu":  # which alone takes microseconds, and not milliseconds
            torch.default_generator.manual_seed(generator.initial_seed())
        else:
            torch.manual_seed(generator.initial_seed())
        yield


def validation_generators(seed: int, count: int, batch_idx: int, trainer: Trainer | None) -> list[torch.Generator]:
    """A generator for each example of a batch that is validated, by its place in the data: the same at all times.

    The data are not shuffled, and every batch but the last is full.

    Args:
        seed: names the training.
        count: examples in the batch.
        batch_idx: of the batch.
        trainer: tells the size of a full batch, and the devices; None is one device.
    """
    full = getattr(trainer.val_dataloaders, "batch_size", count) if trainer else count
    devices, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    return [generator_for(seed, 0, (batch_idx * full + k) * devices + rank) for k in range(count)]
