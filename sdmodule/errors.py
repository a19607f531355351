"""The one kind of error that a wrong input ends in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class SettingsError(ValueError):
    """A setting or an input file cannot be used.

    The message is one sentence for the person who typed it: what was given, what is allowed, what to do.
    The command line prints it alone, without a traceback, and ends with status 1.
    """


def unwritable(folder: str | Path, reason: str | None) -> SettingsError:
    """The error for an output folder that cannot be written."""
    return SettingsError(f"output_dir={folder} cannot be written ({reason}); give a folder that can be.")


def choices(names: Iterable[str]) -> str:
    """Join names for the part of a message that lists what is allowed."""
    return ", ".join(sorted(names))
