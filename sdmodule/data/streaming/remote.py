"""Files at an address, read through fsspec: local paths, ``https://``, ``s3://``, ``gs://``, ``hf://`` and the rest."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.registry import known_implementations
from fsspec.utils import get_protocol

from sdmodule.errors import SettingsError

T = TypeVar("T")

EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
"""Packages that some protocols need, and the extras of sdmodule that install them."""

STREAMED = ("http", "https", "hf")
"""Protocols whose files are read front to back with ``block_size=0``; the server need not know ranges then."""

LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, SettingsError)
"""Errors that another attempt does not change."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

ATTEMPTS = 6
"""How often a shard is asked for before the training ends; half a minute passes."""

PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""

STALLED = 60
"""Seconds without a byte after which a connection counts as lost."""


class Remote:
    """The files of a set.

    Args:
        key: name of the setting that gave the address, for messages.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def read(self, url: str) -> bytes:
        """The bytes of a file; a second attempt is made.

        Raises:
            SettingsError: if it cannot be read.
        """
        return self._explained(url, lambda: _file_system(url).cat_file(_path(url)), attempts=2)

    def open(self, url: str) -> IO[bytes]:
        """A file to read from front to back.

        Raises:
            SettingsError: if it cannot be opened.
        """
        options = {"block_size": 0} if get_protocol(url) in STREAMED else {}
        return self._explained(url, lambda: _file_system(url).open(_path(url), "rb", **options), attempts=2)

    def fetch(self, url: str, target: Path, check: Callable[[], None]) -> None:
        """Copy a file to local disk, again if it broke off or ``check`` raises an error.

        Raises:
            SettingsError: if it cannot be read.
            OSError: if the target cannot be written.
        """

        def copy() -> None:
            _file_system(url).get_file(_path(url), str(target))
            check()

        self._explained(url, copy, ATTEMPTS)

    def matching(self, url: str) -> list[str]:
        """Addresses that match a pattern with ``*``, sorted.

        Raises:
            SettingsError: if the folder cannot be listed.
        """
        system = self._explained(url, lambda: _file_system(url), attempts=1)
        found = self._explained(url, lambda: system.glob(_path(url)), attempts=2)
        return sorted(map(system.unstrip_protocol, found))

    def _explained(self, url: str, action: Callable[[], T], attempts: int) -> T:
        for attempt in range(attempts):
            try:
                return action()
            except Exception as error:  # of fsspec, a cloud's client or the HTTP client, which raise many kinds
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise
                if attempt + 1 == attempts or isinstance(error, LASTING) or not _known(url):
                    raise self._sentence(url, error) from error
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    def _sentence(self, url: str, error: Exception) -> SettingsError:
        if isinstance(error, SettingsError):
            return error
        told, protocol = f"{self.key}={url}", get_protocol(url)
        if not _known(url):
            return SettingsError(
                f"{told}: {protocol} is not known as a protocol; give a local path, or an address such as https://…, "
                "s3://…, gs://… or hf://…."
            )
        if isinstance(error, ImportError):
            package, extra = EXTRAS.get(protocol, ("", ""))
            advice = f"needs the package {package}; pip install 'sdmodule[{extra}]'" if package else one_line(error)
            return SettingsError(f"{told}: {advice}.")
        if isinstance(error, FileNotFoundError):
            return SettingsError(f"{told}: does not exist; check the address.")
        return SettingsError(
            f"{told}: cannot be read ({one_line(error)}); check the address, the network and your access rights."
        )


def one_line(error: Exception) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def is_local(url: str) -> bool:
    """Whether an address is a path on a local disk."""
    return get_protocol(url) in ("file", "local")


def local_path(url: str) -> Path:
    """The path of a local address."""
    return Path(_path(url))


def _known(url: str) -> bool:
    return get_protocol(url) in {*known_implementations, *fsspec.available_protocols()}


def _path(url: str) -> str:
    return _file_system(url)._strip_protocol(url)


def _file_system(url: str) -> Any:
    """The file system of an address; fsspec keeps one for each process, also after a fork."""
    protocol = get_protocol(url)
    if protocol not in ("http", "https"):
        return fsspec.filesystem(protocol)
    import aiohttp

    # by default a file must arrive within five minutes, whatever its size
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
    return fsspec.filesystem(protocol, client_kwargs={"timeout": timeout})
