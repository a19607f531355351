"""Whole shards on local disk: fetched once for all processes of a machine, the oldest deleted when room is needed."""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sdmodule.data.streaming.remote import DISK_ERRORS, Remote
from sdmodule.errors import SettingsError
from sdmodule.io.fingerprint import file_fingerprint, fingerprint

PATIENCE = 60.0
"""Seconds to wait until somebody stops reading a shard that must make room."""

DOWNLOADS = 4
"""Shards that a process fetches ahead at the same time."""


class Shard(NamedTuple):
    """A shard as the index describes it: address, size in bytes, and fingerprint (empty if it is not known)."""

    url: str
    bytes: int
    digest: str


class ShardCache:
    """Shards on local disk, at most so many bytes of them.

    A shard that is read is locked, by the reader's open file, and not deleted; a lock ends with its process, however
    that ends. A shard appears under its name when it is complete. Several runs may share a folder.

    Args:
        folder: where the shards are.
        limit: bytes at most.
        remote: reads the originals.
    """

    def __init__(self, folder: Path, limit: int, remote: Remote) -> None:
        self.folder = folder
        self.limit = limit
        self.remote = remote

    def open(self, shard: Shard) -> BinaryIO:
        """A shard, fetched unless it is there; it stays on disk as long as the file is open.

        Raises:
            SettingsError: if it cannot be read or written, or there is no room for it.
        """
        target = self._target(shard)
        while True:
            try:
                file = target.open("rb")
            except FileNotFoundError:
                self.fetch(shard)
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:  # else it was deleted in between
                with suppress(OSError):
                    os.utime(target)
                return file
            file.close()

    def fetch(self, shard: Shard, wait: bool = True) -> None:
        """Copy a shard to local disk, unless it is there.

        Args:
            shard: which one.
            wait: for another process that is fetching it, and for room; False leaves it then.

        Raises:
            SettingsError: if it cannot be read or written, or there is no room for it.
        """
        target = self._target(shard)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(target.with_suffix(".lock"), wait) as lock:
                if lock is None or target.exists() or not self._reserve(shard, lock, wait):
                    return
                self._copy(shard, target)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                advice = "free some disk space, or set a lower data.cache_gb"
            else:
                advice = "choose a folder on a local disk"
            raise SettingsError(
                f"data.cache_folder={self.folder}: cannot be written ({error.strerror or error}); {advice}."
            ) from error

    def _target(self, shard: Shard) -> Path:
        return self.folder / f"{fingerprint(*shard)}.tar"

    def _copy(self, shard: Shard, target: Path) -> None:
        draft = target.with_suffix(".part")

        def check() -> None:
            if (size := draft.stat().st_size) != shard.bytes:
                raise ValueError(
                    f"{size:,} bytes instead of {shard.bytes:,}: it is truncated, or not the one that was indexed"
                )
            if shard.digest and file_fingerprint(draft) != shard.digest:
                raise ValueError("its bytes are not those that were packed")

        try:
            self.remote.fetch(shard.url, draft, check)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)

    def _reserve(self, shard: Shard, lock: int, wait: bool) -> bool:
        """Make room for a shard and write its size into its lock file, which counts from then on."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with locked(self.folder / "room.lock"):
                if self._make_room(shard.bytes):
                    os.pwrite(lock, str(shard.bytes).encode(), 0)
                    return True
            if not wait:
                return False
            if time.monotonic() > deadline:
                raise SettingsError(
                    f"data.cache_gb={self.limit / 1e9:g}: all shards in {self.folder} are being read, and there is no "
                    "room for another; raise it, or give each run a folder of its own as data.cache_folder."
                )
            time.sleep(0.2)

    def _make_room(self, needed: int) -> bool:
        """Delete the shards that were opened longest ago and that nobody reads, until so many bytes are free."""
        complete: list[tuple[float, int, Path]] = []
        used = 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.name.endswith(".tar"):
                    status = entry.stat()
                    complete.append((status.st_mtime, status.st_size, Path(entry.path)))
                    used += status.st_size
                elif entry.name.endswith(".lock") and entry.name != "room.lock":
                    used += _being_fetched(Path(entry.path))
        for _, size, path in sorted(complete):
            if used + needed <= self.limit:
                break
            if _deleted(path):
                used -= size
        return used + needed <= self.limit


class FetchAhead:
    """Fetches shards before they are read, in threads that end with the process.

    What goes wrong is left to the reader, who fetches the shard again.

    Args:
        cache: where to.
    """

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self._waiting: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        for _ in range(DOWNLOADS):
            threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, shards: Iterable[Shard]) -> None:
        """Fetch some shards soon."""
        for shard in shards:
            self._waiting.put(shard)

    def _run(self) -> None:
        while True:
            shard = self._waiting.get()
            with suppress(Exception):
                self.cache.fetch(shard, wait=False)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Hold a lock file inside the block, and delete it at the end.

    Args:
        path: the file.
        wait: for another process that holds it; without, None is given instead of its descriptor.
    """
    descriptor = _acquire(path, wait)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has a copy of the descriptor
            os.close(descriptor)


def _acquire(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink:  # else whoever held it has deleted it
            return descriptor
        os.close(descriptor)


def _being_fetched(lock: Path) -> int:
    """Bytes of the shard that is being fetched under a lock; what a killed process left is deleted."""
    descriptor = os.open(lock, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(descriptor, 32, 0) or 0)
    else:
        if os.fstat(descriptor).st_nlink:
            lock.with_suffix(".part").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        return 0
    finally:
        os.close(descriptor)


def _deleted(path: Path) -> bool:
    """Delete a shard unless somebody reads it."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True
