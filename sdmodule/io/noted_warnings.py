"""Warnings that are shown as ever, and kept beside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdmodule.io.redact import shorten_home


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """Note the warnings that are shown inside a ``with`` block.

    Yields:
        Their texts in one line each, in order, once each.
    """
    show, noted = warnings.showwarning, []

    def note(message: Warning | str, *where: Any, **told: Any) -> None:
        text = shorten_home(" ".join(str(message).split()))
        if text not in noted:
            noted.append(text)
        show(message, *where, **told)

    warnings.showwarning = note
    try:
        yield noted
    finally:
        if warnings.showwarning is note:
            warnings.showwarning = show
