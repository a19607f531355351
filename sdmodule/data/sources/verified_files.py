"""Which image files were decoded without an error, remembered from run to run by the identity of each file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import PIL

from sdmodule.io.atomic import atomic_write
from sdmodule.io.cache_dir import cache_dir
from sdmodule.io.fingerprint import fingerprint
from sdmodule.io.image_files import ImageFile, identity


class VerifiedFiles:
    """The files of one source that are known to be good, in a file of the user's cache folder.

    A file counts as known only as long as its path, size and date are the same, and the version of Pillow. Without a
    cache folder that can be written, every run checks all files again.

    Args:
        source: names the source.
    """

    def __init__(self, source: str) -> None:
        self._file = cache_dir() / "verified" / f"{fingerprint(source, PIL.__version__)}.txt"
        self._known: set[str] = set()
        with suppress(OSError):
            self._known = set(self._file.read_text().split())
        self._good: set[str] = set()

    @contextmanager
    def checking(self, image: ImageFile) -> Iterator[bool]:
        """Whether a file is known to be good; if the block ends without an error, it is from now on."""
        key = fingerprint(identity(image))
        yield key in self._known
        self._good.add(key)

    def save(self) -> None:
        """Write down what was found to be good."""
        if self._good <= self._known:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._file) as aside:
                aside.write_text("\n".join(sorted(self._good)))
