"""Memory that the process keeps instead of giving it back."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Names of glibc's ``mallopt``; their numbers are part of its interface."""

NEVER = 2**31 - 1
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536}
"""Where glibc's own settings arrive once large blocks have been freed."""

LOCK = threading.Lock()
blocks: list[ctypes.CDLL] = []
"""Of the blocks that are being run, an entry each."""


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Inside a ``with`` block, let freed memory wait for the next layer instead of giving it back to the system.

    glibc takes every large tensor from the system and gives it back when it is freed, so that each layer's result is
    zeroed page by page before it is written. The switch is of the whole process: the last block that ends turns it
    back, so that images sampled amid a training leave its memory alone. Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    with LOCK:
        blocks.append(libc)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        with LOCK:
            blocks.pop()
            if not blocks:
                for name, value in USUAL.items():
                    libc.mallopt(name, value)
                libc.malloc_trim(0)
