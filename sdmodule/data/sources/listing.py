"""The files of a folder that are of use in training, with their sizes and dates, in Arrow columns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.data.index.columns import TEXT, encoded
from sdmodule.io.image_files import SUFFIXES, UNREAD_SUFFIXES

IMAGE, CAPTION, UNREAD = range(3)
"""Kinds of files: images, captions, and images of kinds that are not read."""

KINDS = dict.fromkeys(SUFFIXES, IMAGE) | {".txt": CAPTION} | dict.fromkeys(UNREAD_SUFFIXES, UNREAD)

SCHEMA = pa.schema([("name", TEXT), ("stem", TEXT), ("kind", pa.int8()), ("size", pa.int64()), ("date", pa.int64())])

CHUNK = 2**14
"""Files that are held as Python objects at a time."""

Stamp = tuple[int, int]
"""Size of a file, and its date in nanoseconds; -1 and -1 if it has none."""


def list_files(folder: Path) -> pa.Table:
    """All files in a folder and its subfolders, linked ones too, but hidden ones, sorted by path.

    A folder that is reached a second time, as by a link to its own parent, is not entered again.

    Returns:
        ``name``, the path relative to the folder; ``stem``, the same without the suffix; ``kind``; ``size``; ``date``
        in nanoseconds.
    """
    rows = _rows(str(folder), "", set())
    batches = []
    while chunk := list(islice(rows, CHUNK)):
        batches.append(pa.record_batch(list(zip(*chunk, strict=True)), schema=SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA)


def of_kind(files: pa.Table, kind: int) -> pa.Table:
    """The files of a kind."""
    return files.filter(pc.equal(files.column("kind"), kind))


def stamp(path: str | Path) -> Stamp:
    """Size and date of a file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # not there, or a name that no file can have
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _rows(place: str, prefix: str, seen: set[str]) -> Iterator[tuple[bytes, bytes, int, int, int]]:
    real = os.path.realpath(place)
    if real in seen:
        rank_zero_warn(f"{place} leads to a folder that is read already, {real}, and is left out.")
        return
    seen.add(real)
    for entry in _entries(place):
        name = entry.name
        if name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _rows(entry.path, f"{prefix}{name}/", seen)
            continue
        dot = name.rfind(".")
        kind = KINDS.get(name[dot:].lower()) if dot > 0 else None
        if kind is not None:
            path = prefix + name
            size, date = _stamp(entry)
            yield encoded(path), encoded(path[: dot - len(name)]), kind, size, date


def _entries(place: str) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted; nothing if it cannot be read."""
    try:
        with os.scandir(place) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _stamp(entry: os.DirEntry[str]) -> Stamp:
    try:
        status = entry.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
