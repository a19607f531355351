"""Atomic writes of files and folders: readers see all of them or nothing, even if the writer is killed."""

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

RENAME_EXCHANGE = 2
"""Flag of Linux's ``renameat2``: swap the two paths."""

AT_FDCWD = -100
"""Descriptor for Linux's ``renameat2``: paths are relative to the current folder."""


@contextmanager
def atomic_write(path: str | Path, over_folder: bool = False) -> Iterator[Path]:
    """Write a file to a temporary path; it is flushed and renamed when the block ends, and deleted if the block fails.

    Args:
        path: the final path; its folder must exist.
        over_folder: whether a folder of that name is replaced too.

    Yields:
        The temporary path, in the same folder.

    Raises:
        OSError: if it cannot be moved into place.
    """
    path = Path(path)
    aside = _beside(path)
    try:
        yield aside
        if over_folder:
            move_into_place(aside, path)
        else:
            _flush(aside)
            os.replace(aside, path)
            _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def move_into_place(aside: Path, path: Path) -> None:
    """Flush a temporary file, or a folder of files, to disk and put it in place of whatever is there, in one step.

    Raises:
        OSError: if it cannot be moved.
    """
    for file in sorted(aside.iterdir()) if aside.is_dir() else ():
        _flush(file)
    _flush(aside)
    if not path.exists() or not (aside.is_dir() or path.is_dir()):
        os.replace(aside, path)
    else:
        _exchange(aside, path)
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    _flush(path.parent)


def atomic_write_text(file: Path, text: str) -> None:
    """Write a text file atomically, see `atomic_write`."""
    with atomic_write(file) as aside:
        aside.write_text(text, encoding="utf-8")


def write_text_once(file: Path, text: str) -> str:
    """Write a text file atomically, unless it exists already.

    Returns:
        The content of the file, which may be another process's.
    """
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
    """Write a folder to a temporary path; it replaces the existing one, in one step, when the block ends.

    If the existing folder has files that the new one lacks, they stay, and the new files are moved in one by one.

    Args:
        folder: the final path.

    Yields:
        An empty temporary folder.

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
    """Delete the temporary files of killed processes in a folder.

    Args:
        folder: where to look.
        older_than: age in seconds; younger ones may belong to a process that is still running.
    """
    for left in folder.glob(".*.part"):
        if not re.fullmatch(r"\..+\.[0-9a-f]{32}\.part", left.name):  # not one of ours
            continue
        with suppress(OSError):
            if time.time() - left.stat().st_mtime >= older_than:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _beside(path: Path) -> Path:
    """A temporary path in the same folder, of the form that `remove_leftovers` deletes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def _flush(path: Path) -> None:
    """Flush a file or a folder to disk; not every file system can do that for a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> set[Path]:
    return {file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir()}


def _exchange(one: Path, other: Path) -> None:
    """Swap two files or folders, in one step where the system can, else by three renames."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        swap = None
    if swap is not None and swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return
    temporary = _beside(other)
    os.rename(other, temporary)
    os.rename(one, other)
    os.rename(temporary, one)
