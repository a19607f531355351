"""A part of a predict run: ``shard=3/100`` samples the third of a hundred parts, in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdmodule.errors import SettingsError, count_of
from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.run_folder import to_line

T = TypeVar("T")

PART = "part.json"
"""The file in a part's folder that says which part of which run it is."""


@dataclass(frozen=True)
class Part:
    """One of the parts that a run is split into.

    Parts are runs of whole batches, so that an image shares its batch with the same others as in one process.

    Attributes:
        number: from 1 on.
        parts: their number.
    """

    number: int
    parts: int

    @classmethod
    def parse(cls, text: object) -> Part:
        """A part as it is typed: ``3/100``.

        Raises:
            SettingsError: if it is none.
        """
        found = re.fullmatch(r"0*(\d{1,9})/0*(\d{1,9})", str(text))
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise SettingsError(
                f"shard={text}: must be PART/PARTS, counted from 1, such as 3/100 for the third of a hundred parts."
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"

    @property
    def folder(self) -> str:
        """Name of the part's folder: ``part-003-of-100``."""
        return f"part-{self.number:0{len(str(self.parts))}}-of-{self.parts}"

    def of(self, images: Sequence[T], batch_size: int) -> list[T]:
        """The images of this part, out of those of the run.

        Raises:
            SettingsError: if the run has fewer batches than parts.
        """
        batches = -(-len(images) // batch_size)
        if batches < self.parts:
            raise SettingsError(
                f"shard={self}: {count_of(len(images), 'image')} with batch_size={batch_size} can be split into at "
                f"most {count_of(batches, 'part')}; give no more parts than that, or a smaller batch_size."
            )
        first, end = (batches * k // self.parts * batch_size for k in (self.number - 1, self.number))
        return list(images[first:end])


@dataclass(frozen=True)
class PartOfRun:
    """What ``part.json`` holds.

    Attributes:
        part: its number, from 1 on.
        parts: the number of parts.
        first: index of its first image.
        images: number of its images.
        total: number of images of the whole run.
        requests: digest of what was requested of all images of the run.
        settings: what all images of the run share.
    """

    part: int
    parts: int
    first: int
    images: int
    total: int
    requests: str
    settings: Mapping[str, Any]

    @property
    def announcement(self) -> str:
        """``Part 3 of 100: images 200 to 299 of 10,000, numbered from 0``."""
        last = self.first + self.images - 1
        return f"Part {self.part} of {self.parts}: images {self.first} to {last} of {self.total:,}, numbered from 0"

    def write(self, folder: Path) -> None:
        """Write it into the part's folder."""
        atomic_write_text(folder / PART, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> PartOfRun:
        """That of a part's folder.

        Raises:
            SettingsError: if the folder is none of a part.
        """
        try:
            return cls(**json.loads((folder / PART).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(
                f"{folder}: is no part of a run, as it has no {PART}; give folders that predict wrote with shard=…."
            ) from error


def digest(requests: Iterable[Mapping[str, Any]]) -> str:
    """A digest of what was requested of images, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for request in requests:
        found.update(to_line(request).encode())
    return found.hexdigest()
