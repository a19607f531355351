"""`SettingsError`, the one error that a wrong input ends in, and the checks that raise it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MAX_SEED = 2**64 - 1
"""Largest seed that torch's generators take."""


class SettingsError(ValueError):
    """A setting or an input file cannot be used.

    The message is one sentence for the person who typed it: ``key=value: what is wrong; what is allowed; what to do``.
    The command line prints it alone, without a traceback, and exits with status 1.
    """


def unwritable(folder: str | Path, reason: str | None) -> SettingsError:
    """The error for an output folder that cannot be written."""
    return SettingsError(f"output_dir={folder}: cannot be written ({reason}); choose a folder that can.")


def count_of(number: int, noun: str) -> str:
    """A number with its noun: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def choices(names: Iterable[str]) -> str:
    """Names in alphabetical order, for the part of a message that lists what is allowed."""
    return ", ".join(sorted(names))


def is_int(value: Any) -> bool:
    """Whether a setting is a whole number, of Python or NumPy; true and false are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number; true and false are not."""
    return is_int(value) or (isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value))


def check_int(key: str, value: Any, minimum: int | None = 1, maximum: int | None = None) -> None:
    """Check that a setting is a whole number within bounds, both included.

    Raises:
        SettingsError: if it is not.
    """
    low, high = minimum is not None, maximum is not None
    if is_int(value) and not (low and value < minimum) and not (high and value > maximum):  # type: ignore[operator]
        return
    bounds = f" from {minimum} to {maximum}" if low and high else f" of at least {minimum}" if low else ""
    raise SettingsError(f"{key}={value}: must be a whole number{bounds}.")


def check_number(
    key: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Check that a setting is a finite number within bounds.

    Args:
        key: name of the setting.
        value: what was given.
        minimum: smallest value allowed.
        maximum: largest value allowed.
        above: the value must be greater than this.
        below: the value must be less than this.

    Raises:
        SettingsError: if it is not.
    """
    if is_number(value) and minimum <= value <= maximum and above < value < below:
        return
    words = (("of at least", minimum), ("greater than", above), ("of at most", maximum), ("less than", below))
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in words if math.isfinite(bound))
    raise SettingsError(f"{key}={value}: must be a number {bounds}".rstrip() + ".")


def check_bool(key: str, value: Any) -> None:
    """Check that a setting is true or false; any text, even ``no``, would count as true.

    Raises:
        SettingsError: if it is neither.
    """
    if not isinstance(value, bool):
        raise SettingsError(f"{key}={value}: must be true or false.")


def check_choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    """Check that a setting is one of several names.

    Raises:
        SettingsError: if it is not.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise SettingsError(f"{key}={value}: unknown; choose one of {choices(allowed)}.")


def check_path(key: str, value: Any) -> None:
    """Check that a setting is a non-empty path; an empty one would mean the current folder.

    Raises:
        SettingsError: if it is not.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise SettingsError(f"{key}={value}: must be a non-empty path, in quotes if it is a number.")


def check_seed(key: str, value: Any) -> None:
    """Check a seed of torch's generators.

    Raises:
        SettingsError: if it is not a whole number from 0 to `MAX_SEED`.
    """
    check_int(key, value, minimum=0, maximum=MAX_SEED)


def build_settings(
    kind: type[T],
    group: str,
    settings: Mapping[str, Any] | None,
    exclude: Iterable[str] = (),
    beside: Iterable[str] = (),
) -> T:
    """A settings data class from a mapping; what is left out keeps its default.

    Args:
        kind: the data class.
        group: name of the group of settings, for messages.
        settings: values by name; None for all defaults.
        exclude: fields that are not settings of this group.
        beside: settings of this group that are no fields, for messages.

    Raises:
        SettingsError: for anything but a mapping, an unknown name, or a value that the class refuses.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise SettingsError(f"{group}={settings!r}: must be settings such as {group}={{name: value}}.")
    known = {field.name for field in fields(kind)} - set(exclude)  # type: ignore[arg-type]
    if unknown := set(settings or {}) - known:
        raise SettingsError(f"{group}.{choices(unknown)}: unknown; {group} has {choices({*known, *beside})}.")
    return kind(**(settings or {}))
