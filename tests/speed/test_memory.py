"""Memory that is kept: the system is asked for it once."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from sdmodule.speed.memory import retain_freed_memory

SIZE = 40 * 2**20


def pages_given() -> int:
    """How many the system gives for a large tensor, at least: the first ones find no room among what was freed."""
    given = []
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(SIZE, dtype=torch.uint8)
        given.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(given)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept_in_spite_of_a_block_within_that_ends():
    with retain_freed_memory():
        assert pages_given() < 100
        with retain_freed_memory():  # as that of images sampled amid a training
            assert pages_given() < 100
        assert pages_given() < 100
