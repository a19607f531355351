"""A lock on an output folder, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdmodule.errors import SettingsError

PATIENCE = 8.0
"""Seconds to wait for the lock: a killed run that writes a large file takes a while to end."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _let_go() -> None:
    """Give up the locks in a forked process: data loading workers outlive a killed run by seconds."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def folder_locked(folder: Path, patience: float | None = None) -> Iterator[None]:
    """Keep other runs out of a folder inside the block.

    The lock is on the folder itself, so no file is left behind. On a file system without locks there is none.

    Args:
        folder: made if it does not exist.
        patience: seconds to wait for another run to end; `PATIENCE` if None.

    Raises:
        SettingsError: if another run still writes to the folder.
        OSError: if the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner, descriptor = os.getpid(), os.open(folder, os.O_RDONLY)
    try:
        _wait_for_lock(descriptor, folder, PATIENCE if patience is None else patience)
        _held.add(descriptor)
        yield
    finally:
        if os.getpid() == owner:  # in a forked process it is closed already
            _held.discard(descriptor)
            os.close(descriptor)


def _wait_for_lock(descriptor: int, folder: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"output_dir={folder}: another run is writing to this folder; wait for its end, or choose another."
                ) from error
            time.sleep(0.1)
        except OSError:  # of a file system without locks
            return
