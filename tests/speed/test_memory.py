"""Freed memory is kept, so that the system maps it once."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from sdmodule.speed.memory import retain_freed_memory

SIZE = 40 * 2**20


def page_faults() -> int:
    """Page faults of a large tensor, the fewest of 40: the first ones may not fit into freed memory."""
    faults = []
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(SIZE, dtype=torch.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept_after_a_nested_block_ends():
    with retain_freed_memory():
        assert page_faults() < 100
        with retain_freed_memory():  # as for samples during a training
            assert page_faults() < 100
        assert page_faults() < 100
