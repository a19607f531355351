"""Whether the PNGs of a run are whole, by the checksums in them: several times faster than to decode their pixels."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from sdmodule.errors import SettingsError
from sdmodule.io.png_metadata import parse_metadata, read_metadata

SIGNATURE = b"\x89PNG\r\n\x1a\n"
REMEMBERED = 1024
"""Chunks that are remembered; the images of a run share most of theirs."""


class PNGScanner:
    """Read the metadata of many PNGs of one run, each checked from its first byte to its last.

    Every chunk of a PNG ends with a checksum (ISO/IEC 15948, 5.3), so a file that was cut off or has a changed bit is
    found without decoding it. No more than one file is in memory.
    """

    def __init__(self) -> None:
        self._texts: dict[bytes, tuple[str, str]] = {}

    def metadata(self, path: Path) -> dict[str, Any]:
        """The metadata that predict wrote into an image.

        Raises:
            SettingsError: if the file is not an intact PNG, or lacks these metadata.
            OSError: if it cannot be read.
        """
        text = self._text(path.read_bytes(), path)
        return read_metadata(path) if text is None else parse_metadata(text, path)

    def _text(self, content: bytes, path: Path) -> dict[str, str] | None:
        """The text of an intact PNG; None if another program wrote it in a form that predict does not use."""
        text: dict[str, str] = {}
        position, kind, kinds = len(SIGNATURE), b"", set()
        if not content.startswith(SIGNATURE):
            raise _damaged(path)
        while kind != b"IEND":
            length = int.from_bytes(content[position : position + 4])
            chunk = content[position : position + length + 12]
            position, kind = position + length + 12, chunk[4:8]
            if (known := self._texts.get(chunk)) is None:
                if len(chunk) < length + 12 or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
                    raise _damaged(path)
                kinds.add(kind)
                if kind in (b"tEXt", b"zTXt"):
                    return None
                if kind != b"iTXt":
                    continue
                if (known := _name_and_text(chunk[8:-4])) is None:
                    return None
                if len(self._texts) < REMEMBERED:
                    self._texts[chunk] = known
            text[known[0]] = known[1]
        if not {b"IHDR", b"IDAT"} <= kinds:
            raise _damaged(path)
        return text


def _name_and_text(content: bytes) -> tuple[str, str] | None:
    """What an ``iTXt`` chunk holds (ISO/IEC 15948, 11.3.4.5); None if it is compressed or invalid."""
    name, _, rest = content.partition(b"\0")
    parts = rest[2:].split(b"\0", 2)  # language, translated name, text
    if rest[:2] != b"\0\0" or len(parts) < 3:
        return None
    try:
        return name.decode("latin-1"), parts[2].decode()
    except UnicodeDecodeError:
        return None


def _damaged(path: Path) -> SettingsError:
    return SettingsError(f"{path}: is damaged or no PNG; make it again.")
