"""A command starts faster while nobody looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect no garbage inside a ``with`` block, or until `gc_resume` is called.

    Importing makes a million objects and no garbage: looking for it among them took a fifth of a command's start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def gc_resume() -> None:
    """Collect garbage from here on, without looking through all that was imported.

    That is done once in a process: what a sweep's earlier jobs have left behind must remain to be found.
    """
    if not gc.get_freeze_count():
        gc.freeze()
    gc.enable()
