"""Images in tar shards of the webdataset layout: the files of one sample share their name up to the first dot.

The positions of all members are read once and kept, after which any image can be read directly. So shards are
shuffled, mixed, bucketed, cached and resumed as folders are, and every device has an equal part of every batch, which
streaming shards cannot give.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from sdmodule.data.example import Example
from sdmodule.data.index.columns import CLOCK, TEXT, ExampleColumns, about, decoded, encoded, texts, with_about
from sdmodule.data.sources.folder import some
from sdmodule.data.sources.listing import Stamp, stamp
from sdmodule.data.sources.path_patterns import existing_part, expand_braces
from sdmodule.errors import SettingsError, check_path, choices
from sdmodule.io.image_files import SUFFIXES, ImageFile
from sdmodule.io.progress import LONG_TASK, progress


class Member(NamedTuple):
    """A file in a tar."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            OSError: if the tar ends before the file does.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.shard} is cut off")
        return content

    def identity(self) -> str:
        """Path, size and date of the shard, and the place in it."""
        status = self.shard.stat()
        return f"{self.shard} {status.st_size} {status.st_mtime_ns} {self.offset} {self.size}"

    def __str__(self) -> str:
        return f"{self.shard.name}/{self.name}"


ROWS = pa.schema([("name", TEXT), ("offset", pa.int64()), ("size", pa.int64()), ("date", pa.int64()), ("text", TEXT)])
"""Columns of the images in one shard."""


@dataclass
class IndexedShard:
    """What was read of a shard.

    Attributes:
        shard: its path.
        stamp: its size and date.
        rows: its images; see `ROWS`.
        others: how many files it holds that are neither image nor caption, by suffix.
        bare: images without a caption.
        error: of the first caption that cannot be read.
    """

    shard: Path
    stamp: Stamp
    rows: pa.Table
    others: dict[str, int]
    bare: list[str] = field(default_factory=list)
    error: SettingsError | None = None


@dataclass(frozen=True)
class Shards:
    """Tar files of images, each with its caption in a ``.txt`` or a ``.json`` of the same name.

    Args:
        shards: a path, which may contain ``{000..009}``, ``{a,b}`` or ``*``, or several.
        caption_key: key of the caption in a ``.json``; where there is a ``.txt`` too, that is the caption.
        key: name of the setting that gave it, for messages.

    Raises:
        SettingsError: for a path that is no string.
    """

    shards: str | Sequence[str]
    caption_key: str = "caption"
    key: str = "data.shards"

    def __post_init__(self) -> None:
        several = isinstance(self.shards, Sequence) and not isinstance(self.shards, str)
        for pattern in self.shards if several else [self.shards]:
            check_path(self.key, pattern)

    def __str__(self) -> str:
        return f"{self.key}={self.shards}"

    def place(self) -> tuple[object, ...]:
        """What identifies the source, wherever a run is started."""
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        return "shards", *(os.path.abspath(Path(pattern).expanduser()) for pattern in patterns), self.caption_key

    def find(self, known: pa.Table | None = None) -> ShardExamples:
        """The images, in the order of the shards and of their members.

        Args:
            known: what an earlier start has found; a shard that has not changed since is not read again.

        Raises:
            SettingsError: if a shard cannot be read, an image has no caption, or there are no images.
        """
        indexed = self._indexed(known)
        if bare := [name for one in indexed for name in one.bare]:
            raise SettingsError(
                f"{self}: images without a caption: {some(bare)}; put a .txt or a .json of the same name beside each."
            )
        if not sum(len(one.rows) for one in indexed):
            raise SettingsError(f"{self}: contains no images; images end in {choices(SUFFIXES)}.")
        if error := next((one.error for one in indexed if one.error), None):
            raise error
        others: Counter[str] = Counter()
        for one in indexed:
            others.update(one.others)
        if others:
            kinds = choices(f"{count} {kind or 'without a suffix'}" for kind, count in others.items())
            rank_zero_warn(f"{self}: left out files that are neither image nor caption: {kinds}.")
        numbers = np.repeat(np.arange(len(indexed), dtype=np.int32), [len(one.rows) for one in indexed])
        table = pa.concat_tables(one.rows for one in indexed).append_column("shard", pa.array(numbers))
        shards = [[os.path.abspath(one.shard), *one.stamp, len(one.rows), one.others] for one in indexed]
        return ShardExamples(with_about(table, shards=shards))

    def held(self, known: pa.Table) -> ShardExamples:
        """The images that columns name, without a look at the shards."""
        return ShardExamples(known)

    def _indexed(self, known: pa.Table | None) -> list[IndexedShard]:
        """All shards, those that have not changed as they are known."""
        unchanged: dict[tuple[object, ...], IndexedShard] = {}
        start = 0
        for path, size, date, count, others in [] if known is None else about(known)["shards"]:
            if known is not None and date < about(known)["checked"] - CLOCK:
                rows = known.slice(start, count).select(ROWS.names)
                unchanged[path, size, date] = IndexedShard(Path(path), (size, date), rows, others)
            start += count
        found = []
        shards = self.files()
        with progress(len(shards), f"{self.key}: indexing shards", delay=LONG_TASK) as on_done:
            for shard in shards:
                held = unchanged.get((os.path.abspath(shard), *stamp(shard)))
                found.append(held or self._index(shard))
                on_done(1)
        return found

    def _index(self, shard: Path) -> IndexedShard:
        """Read the names, places and captions of a shard."""
        seen = stamp(shard)
        one = IndexedShard(shard, seen, ROWS.empty_table(), {})
        others: Counter[str] = Counter()
        rows: list[tuple[bytes, int, int, int, bytes]] = []
        for files in _samples(shard, str(self)):
            images = [files.pop(kind) for kind in sorted(SUFFIXES & files.keys())]
            caption = files.pop(".txt", None) or files.pop(".json", None)
            if len(images) > 1:
                raise SettingsError(f"{self}: {images[0]} and {images[1]} have the same name; keep one of them.")
            if images and caption:
                files.pop(".json", None)
                text = b""
                try:
                    text = encoded(self.caption(caption))
                except SettingsError as error:
                    one.error = one.error or error
                rows.append((encoded(images[0].name), images[0].offset, images[0].size, seen[1], text))
            else:
                one.bare += map(str, images)
            others.update(files.keys())
        one.others = dict(others)
        if rows:
            one.rows = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(zip(*rows), ROWS)], schema=ROWS)
        return one

    def files(self) -> list[Path]:
        """Paths of the shards.

        Raises:
            SettingsError: if one does not exist.
        """
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        paths: list[Path] = []
        for pattern in patterns:
            folder, rest = existing_part(Path(pattern).expanduser())
            for expanded in expand_braces(rest):
                path = folder / expanded
                found = (
                    [path] if path.exists() else sorted(folder / name for name in glob.glob(expanded, root_dir=folder))
                )
                if not found:
                    raise SettingsError(f"{self}: {path} does not exist; give local .tar files.")
                paths += found
        if not paths:
            raise SettingsError(f"{self}: names no files; give a path such as shards/{{000..009}}.tar.")
        return paths

    def name_of(self, image: ImageFile) -> str:
        """The name of the shard, and the image's name in it."""
        return str(image)

    def caption(self, file: Member) -> str:
        """The caption in a ``.txt`` or a ``.json``.

        Raises:
            SettingsError: if the file cannot be read or has none.
        """
        try:
            text = file.read().decode("utf-8-sig")
            if not file.name.lower().endswith(".json"):
                return text.strip()
            content = json.loads(text)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{self}: the caption {file} cannot be read ({error}); replace it by UTF-8 text or JSON."
            ) from error
        if not isinstance(content, dict) or not isinstance(caption := content.get(self.caption_key), str):
            keys = f"only {choices(map(str, content))}" if isinstance(content, dict) else "and is not an object"
            raise SettingsError(
                f"{self} caption_key={self.caption_key}: {file} has no string under this key, {keys}; give the key of "
                "the captions."
            )
        return caption


class ShardExamples(ExampleColumns):
    """Images in shards with their captions.

    Columns are ``shard``, its number, ``name``, ``offset`` and ``size`` of the image in it, and ``date``, the shard's.
    """

    @override
    def example(self, row: int) -> Example:
        shard = Path(self.about["shards"][self.value("shard", row)][0])
        member = Member(shard, decoded(self.value("name", row)), self.value("offset", row), self.value("size", row))
        return Example(member, decoded(self.value("text", row)))

    @override
    def name(self, row: int) -> str:
        return str(self.example(row).path)

    @override
    def keys(self) -> pa.Array:
        """Path of the shard and name in it."""
        paths = texts(path for path, *_ in self.about["shards"])
        shards = paths.take(self.table.column("shard").combine_chunks())
        return pc.binary_join_element_wise(shards, self.table.column("name").combine_chunks(), pa.scalar(b"\0", TEXT))


def _samples(shard: Path, given: str) -> list[dict[str, Member]]:
    """The samples of a shard, each a dictionary of its files by their suffix, from the first dot on, in lower case."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                if member.isdir() or base.startswith("."):  # hidden, as macOS puts beside each file
                    continue
                stem, dot, suffix = base.partition(".")
                if not member.isreg():
                    suffix += " (link)"
                sample = samples.setdefault(folder + slash + stem, {})
                if (kind := dot + suffix.lower()) in sample:
                    raise SettingsError(f"{given}: {shard} contains {member.name} twice; keep one of them.")
                sample[kind] = Member(shard, member.name, member.offset_data, member.size)
            if any(Member(shard, "", tar.offset, tarfile.BLOCKSIZE).read() or b"no end"):
                raise tarfile.ReadError("it is truncated")  # tarfile itself takes a corrupt header for the end
    except (tarfile.TarError, OSError) as error:
        raise SettingsError(
            f"{given}: {shard} cannot be read ({error}); give complete, uncompressed tar files."
        ) from error
    return list(samples.values())
