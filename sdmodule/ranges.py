"""Whether a plain value that was given is one that can be used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sdmodule.errors import SettingsError

LARGEST_SEED = 2**32 - 1
"""Of numpy's generator, which a training seeds beside torch's."""


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Check a setting that counts something.

    Raises:
        SettingsError: if it is no whole number of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{name}={value} is not allowed; give a whole number of at least {least}.")


def check_seed(name: str, value: Any) -> None:
    """Check a setting that random numbers of a training are drawn from.

    Raises:
        SettingsError: if it is no whole number of 32 bits.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_SEED:
        raise SettingsError(f"{name}={value} is not allowed; give a whole number from 0 to {LARGEST_SEED}.")


def check_flag(name: str, value: Any) -> None:
    """Check a setting that is on or off: any text, ``no`` too, would count as on.

    Raises:
        SettingsError: if it is neither true nor false.
    """
    if not isinstance(value, bool):
        raise SettingsError(f"{name}={value} is not allowed; give true or false.")


def check_place(name: str, value: Any) -> None:
    """Check a setting that says where something is; nothing at all would be the current folder.

    Raises:
        SettingsError: if it is no text, or an empty one.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise SettingsError(f"{name}={value} names no place; give a text, in quotes where it is a number.")


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
