"""Files and folders that are seen whole or not at all, whenever the process that writes them is killed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

EXCHANGE = 2
"""RENAME_EXCHANGE of Linux's ``renameat2``."""

HERE = -100
"""AT_FDCWD: paths are those of the current folder."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file aside: it takes its place, on the disk, when the block ends, and is removed if the block fails.

    Args:
        path: where the file is to be; its folder exists.

    Yields:
        Where to write it.

    Raises:
        OSError: if it cannot be moved into place.
    """
    path = Path(path)
    aside = _beside(path)
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def atomic_write_text(file: Path, text: str) -> None:
    """Write a text as `atomic_write` does."""
    with atomic_write(file) as aside:
        aside.write_text(text, encoding="utf-8")


def write_text_once(file: Path, text: str) -> str:
    """Write a text as `atomic_write` does, unless another process was first; give what the file holds."""
    aside = _beside(file)
    try:
        aside.write_text(text, encoding="utf-8")
        with suppress(FileExistsError):
            os.link(aside, file)
        return file.read_text(encoding="utf-8")
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_replace_dir(folder: str | Path) -> Iterator[Path]:
    """Write a folder aside; it takes the place of the one that is there, at once, when the block ends.

    Where that one holds other files too, it is not ours alone: these stay, and the new files are put there one by one.

    Args:
        folder: where it is to be.

    Yields:
        An empty folder to write into.

    Raises:
        OSError: if it cannot be moved into place.
    """
    folder = Path(os.path.realpath(folder))
    aside = _beside(folder)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in sorted(aside.rglob("*")):
            _flush(file)
        if not folder.is_dir():
            os.rename(aside, folder)
        elif _files(folder) <= _files(aside):
            _exchange(aside, folder)
        else:
            for file in sorted(_files(aside)):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(aside / file, folder / file)
        _flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Remove what killed processes have left half-written in a folder.

    Args:
        folder: where to look.
        older_than: seconds; younger ones may be another process's that is at work.
    """
    for left in folder.glob(".*.part"):
        if not re.fullmatch(r"\..+\.[0-9a-f]{32}\.part", left.name):  # another program's
            continue
        with suppress(OSError):
            if time.time() - left.stat().st_mtime >= older_than:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def _flush(path: Path) -> None:
    """Have what is written lie on the disk; not every file system can do that for a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir()}


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders; where the system cannot do it at once, by three renames."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        swap = None
    if swap is not None and swap(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return
    between = _beside(other)
    os.rename(other, between)
    os.rename(one, other)
    os.rename(between, one)
