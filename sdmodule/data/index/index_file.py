"""The file that keeps what a start has learned about a source, in the user's cache folder, for all later starts."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import PIL
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from sdmodule.data.index.columns import about, mapped, with_about
from sdmodule.io.atomic import atomic_write
from sdmodule.io.cache_dir import cache_dir
from sdmodule.io.fingerprint import fingerprint
from sdmodule.io.progress import LONG_TASK

FORM = 1
"""Number of the layout of the columns; another one reads everything anew."""

_asked: set[Path] = set()
"""Indices that this process has asked for."""


class SourceIndex:
    """The index of one source, while this process alone may write it.

    Attributes:
        file: its file.
        table: what earlier starts have learned; None if there is nothing, or nothing that can be read.
        fresh: whether another process of this run has looked for changes since this one started.
        began: when this start began to look, in nanoseconds.

    Args:
        file: its file.
        fresh_since: see ``fresh``; nanoseconds.
    """

    def __init__(self, file: Path, fresh_since: int) -> None:
        self.file = file
        self.began = time.time_ns()
        self.table: pa.Table | None = None
        with suppress(OSError, pa.ArrowInvalid, ValueError):
            self.table = mapped(file)
        self.fresh = self.table is not None and _checked(file) >= fresh_since
        self._told = False

    def save(self, table: pa.Table) -> tuple[pa.Table, Path | None]:
        """Write the columns; without a folder that can be written, a warning says so.

        Returns:
            The columns, mapped into memory, and the file that they are mapped from; as they are, and None, where they
            cannot be written.
        """
        table = with_about(table, generation=uuid.uuid4().hex)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file) as aside, pa.OSFile(str(aside), "wb") as sink:
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table.combine_chunks())
            return mapped(self.file), self.file
        except OSError as error:
            if not self._told:
                rank_zero_warn(
                    f"{self.file.parent} cannot be written ({error.strerror or error}), so every start reads all "
                    "images; set XDG_CACHE_HOME to a folder that can."
                )
            self._told = True
            return table, None

    def note_checked(self, table: pa.Table) -> None:
        """Note that this process has just looked for changes and found these columns, for the others of its run."""
        with suppress(OSError):
            note = {"host": socket.gethostname(), "began": self.began, "generation": about(table).get("generation")}
            with atomic_write(_note(self.file)) as aside:
                aside.write_text(json.dumps(note))


def _note(file: Path) -> Path:
    return file.with_suffix(".json")


def _checked(file: Path) -> int:
    """When a process of this machine last looked for changes; 0 if none has, or the index was written since."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(_note(file).read_text())
        if note["host"] == socket.gethostname() and note["generation"] == about(mapped(file)).get("generation"):
            return int(note["began"])
    return 0


@contextmanager
def index_of(*source: object) -> Iterator[SourceIndex]:
    """The index of a source; others that ask for it wait until the block ends, or until this process does.

    Of the processes of one run the first looks for changes; ranks other than 0 take what it has found. Without locks,
    as on some network file systems, each looks for itself.

    Args:
        source: whatever identifies it.
    """
    file = cache_dir() / "index" / f"{fingerprint(FORM, PIL.__version__, *source)}.arrow"
    start = process_start()
    first = file not in _asked
    _asked.add(file)
    follows = first and start is not None and getattr(rank_zero_only, "rank", 0) != 0
    with _locked(file.with_suffix(".lock")):
        yield SourceIndex(file, start if follows and start is not None else time.time_ns())


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that ends with this process; none where the file cannot be made."""
    descriptor = None
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if descriptor is not None:
            _wait(descriptor)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait(descriptor: int) -> None:
    told = time.monotonic() + LONG_TASK
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > told and getattr(rank_zero_only, "rank", 0) == 0:
                print("Waiting for another process that reads the same images", flush=True)
                told = float("inf")
            time.sleep(0.05)
        except OSError:  # of a file system without locks
            return


def process_start() -> int | None:
    """When this process started, in nanoseconds of `time.time_ns`; None where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return None
    return time.time_ns() - int(age * 1e9)
