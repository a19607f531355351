"""Memory that the process keeps instead of returning it to the system."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt``; the numbers are part of its ABI."""

NEVER = 2**31 - 1
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536}
"""The values that glibc's dynamic thresholds reach once large blocks have been freed."""

LOCK = threading.Lock()
active: list[ctypes.CDLL] = []
"""One entry for each ``with`` block that is open."""


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Keep freed memory for the next layer inside a ``with`` block, instead of returning it to the system.

    By default glibc maps every large tensor and unmaps it when it is freed, so the kernel zeroes each layer's
    result page by page before it is written. The switch holds for the whole process: the last block to end turns it
    off, so that sampling in the middle of a training leaves the training's memory alone. Does nothing with another C
    library.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    with LOCK:
        active.append(libc)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        with LOCK:
            active.pop()
            if not active:
                for name, value in USUAL.items():
                    libc.mallopt(name, value)
                libc.malloc_trim(0)
