"""A folder of images, with captions in a metadata file or in a ``.txt`` beside each image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import override

from sdmodule.data.example import Example
from sdmodule.data.index.columns import (
    CLOCK,
    TEXT,
    ExampleColumns,
    about,
    decoded,
    encoded,
    merged,
    numbers,
    positions_in,
    texts,
    with_about,
)
from sdmodule.data.sources.listing import CAPTION, IMAGE, UNREAD, list_files, of_kind, stamp
from sdmodule.data.sources.metadata_file import EXTRA_COLUMNS, has_extra_columns, read_metadata, read_text
from sdmodule.errors import SettingsError, check_path, choices
from sdmodule.io.image_files import SUFFIXES, ImageFile

METADATA = ("metadata.jsonl", "metadata.csv")

FIELDS = ("name", "text", "mask", "control")
"""Columns that come from a metadata file."""


@dataclass(frozen=True)
class Folder:
    """A folder of images with captions; see `find_examples`.

    Args:
        root: the folder.
        key: name of the setting that gave it, for messages.
        prompt: one caption for all images, which then need none of their own.

    Raises:
        SettingsError: for a root or a prompt that is no string.
    """

    root: str
    key: str = "data.root"
    prompt: str | None = None

    def __post_init__(self) -> None:
        check_path(self.key, self.root)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise SettingsError(f"prompt={self.prompt} of {self}: must be one caption, in quotes.")

    def __str__(self) -> str:
        return f"{self.key}={self.root}"

    def place(self) -> tuple[object, ...]:
        """What identifies the source, wherever a run is started."""
        return "folder", absolute(self.root), self.prompt

    def find(self, known: pa.Table | None = None) -> ExampleColumns:
        """The images, sorted by name; captions that ``known`` columns have are not read again."""
        return find_examples(self.root, self.key, self.prompt, known)

    def held(self, known: pa.Table) -> ExampleColumns:
        """The images that columns name, without a look at the folder."""
        return FolderExamples(known, absolute(self.root), self.prompt)

    def name_of(self, image: ImageFile) -> str:
        """The image's path relative to the folder."""
        return os.path.relpath(str(image), absolute(self.root))


class FolderExamples(ExampleColumns):
    """Images of a folder with their captions.

    Columns are ``name``, ``mask`` and ``control``, paths relative to the folder; ``size`` and ``date`` of these files;
    and ``caption_file`` with its size and date where captions are in files of their own.

    Args:
        table: the columns.
        folder: the absolute path of the folder.
        prompt: one caption for all images.
    """

    def __init__(self, table: pa.Table, folder: Path, prompt: str | None) -> None:
        super().__init__(table)
        self.folder = folder
        self.prompt = prompt

    @override
    def example(self, row: int) -> Example:
        mask, control = (self.text(name, row) for name in ("mask", "control"))
        return Example(
            self.folder / self.name(row),
            self.caption(row),
            None if mask is None else self.folder / mask,
            control=None if control is None else self.folder / control,
        )

    @override
    def name(self, row: int) -> str:
        return decoded(self.value("name", row))

    @override
    def caption(self, row: int) -> str:
        return self.prompt if self.prompt is not None else decoded(self.value("text", row))

    @override
    def keys(self) -> pa.Array:
        """Path of the image and, where there are some, of its mask and its control image."""
        name, *others = (self.table.column(name) for name in ("name", "mask", "control") if name in self._columns)
        if not others:
            return name
        return pc.binary_join_element_wise(
            name, *(pc.fill_null(other, b"") for other in others), pa.scalar(b"\0", TEXT)
        )


def find_examples(
    root: str | Path, key: str = "data.root", prompt: str | None = None, known: pa.Table | None = None
) -> FolderExamples:
    """List a folder's images with their captions, sorted by name, without opening the images.

    Captions come from the first of these that exists: ``metadata.jsonl``, ``metadata.csv`` (columns ``file_name``,
    relative to the folder, and ``text``), or a ``.txt`` beside each image. Subfolders are included, hidden files are
    not. Images that the metadata file does not list are left out with a warning. The optional column
    ``mask_file_name`` names each image's mask, ``conditioning_image_file_name`` its control image.

    Args:
        root: the folder.
        key: name of the setting that gave it, for messages.
        prompt: one caption for all images, which then need none of their own; masks and control images that the
            metadata name do not count as images.
        known: what an earlier start has found; captions of files that have not changed since are taken from it.

    Raises:
        SettingsError: if the folder or its captions are missing, incomplete or malformed.
    """
    folder = absolute(root)
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise SettingsError(f"{key}={root}: {problem}; give a folder of images with captions.")
    files = list_files(folder)
    images = of_kind(files, IMAGE)
    _report_unread(of_kind(files, UNREAD), key)
    metadata = next((file for name in METADATA if (file := folder / name).is_file()), None)
    size, date = (0, 0) if metadata is None else stamp(metadata)
    seen = None if metadata is None else [metadata.name, size, date]
    same = known is not None and seen is not None and about(known).get("metadata") == seen and _settled(known, date)
    listed = known.column_names if same and known is not None else []
    if prompt is not None and len(images):
        extra = bool({"mask", "control"} & {*listed}) if listed else metadata and has_extra_columns(metadata, key)
        if not extra:
            found = with_about(images.select(["name", "size", "date"]), metadata=seen)
            return FolderExamples(found, folder, prompt)
    if metadata is None:
        if not len(images):
            raise SettingsError(f"{key}={root}: contains no images; images end in {choices(SUFFIXES)}.")
        return FolderExamples(_with_sidecars(images, of_kind(files, CAPTION), folder, key, known), folder, prompt)
    rows = known.select([name for name in FIELDS if name in listed]) if listed and known is not None else None
    if rows is None:
        rows = _read_rows(metadata, key, prompt)
    found = with_about(_with_stamps(rows, files, images, metadata, key), metadata=seen)
    return FolderExamples(found, folder, prompt)


def absolute(root: str | Path) -> Path:
    """The absolute path of a folder; links are not followed, since images may be links to files elsewhere."""
    return Path(os.path.abspath(Path(root).expanduser()))


def has_images(folder: Path) -> bool:
    """Whether a folder or one of its subfolders has images, but hidden ones."""
    return len(of_kind(list_files(folder), IMAGE)) > 0


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and the number of the others."""
    first = ", ".join(names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


def _settled(known: pa.Table, date: int) -> bool:
    """Whether a date is so much older than the columns that the file cannot have changed since and have kept it."""
    return date < about(known).get("checked", 0) - CLOCK


def _report_unread(unread: pa.Table, key: str) -> None:
    """Name the images of kinds that cannot be read, which are left out."""
    if len(unread):
        rank_zero_warn(
            f"{key}: left out {len(unread)} images of kinds that are not read: {_some_of(unread.column('name'))}; "
            "convert them to PNG or JPEG."
        )


def _some_of(names: pa.ChunkedArray) -> str:
    """The first few of many paths, and the number of the others."""
    first = [decoded(name.as_py()) for name in names[:3]]
    return ", ".join(first) if len(names) <= 3 else f"{', '.join(first)} and {len(names) - 3} more"


def _with_sidecars(images: pa.Table, captions: pa.Table, folder: Path, key: str, known: pa.Table | None) -> pa.Table:
    """The images, each with the caption in the ``.txt`` beside it, whatever the case of that suffix."""
    where = positions_in(captions.column("stem"), images.column("stem"))
    if (where < 0).any():
        raise SettingsError(
            f"{key}={folder}: images without a caption: {_some_of(images.filter(where < 0).column('name'))}; put a "
            "metadata.jsonl or metadata.csv (file_name, text) into the folder, or a .txt beside each image."
        )
    unused = pc.invert(pc.is_in(captions.column("stem"), value_set=images.column("stem")))
    if lone := pc.sum(unused).as_py():
        named = _some_of(captions.filter(unused).column("name"))
        rank_zero_warn(f"{key}: {lone} captions have no image: {named}.")
    files = captions.take(pa.array(where))
    found = images.select(["name", "size", "date"])
    for column, name in {"name": "caption_file", "size": "caption_size", "date": "caption_date"}.items():
        found = found.append_column(name, files.column(column))
    return found.append_column("text", _captions(found, folder, key, known))


def _captions(images: pa.Table, folder: Path, key: str, known: pa.Table | None) -> pa.Array:
    """The captions in files beside the images; of unchanged files they are those that are known."""
    names = images.column("caption_file")
    positions, old = np.full(len(images), -1), pa.array([], TEXT)
    if known is not None and "caption_file" in known.column_names:
        positions, old = positions_in(known.column("caption_file"), names), known.column("text")
        dates, known_dates = numbers(images, "caption_date"), numbers(known, "caption_date")
        same = (dates == known_dates[positions]) & (dates < about(known).get("checked", 0) - CLOCK)
        same &= numbers(images, "caption_size") == numbers(known, "caption_size")[positions]
        positions[~same] = -1
    changed = np.flatnonzero(positions < 0)
    new = {int(k): encoded(read_text(folder / decoded(names[k].as_py()), key).strip()) for k in changed}
    return merged(old, positions, new)


def _read_rows(metadata: Path, key: str, prompt: str | None) -> pa.Table:
    """The rows of a metadata file in columns; those that no row has a value for are left out."""
    rows = read_metadata(metadata, key, prompt)
    if not rows:
        raise SettingsError(f"{key}: {metadata} lists no images; add a row with file_name and text for each image.")
    for column, field in EXTRA_COLUMNS.items():
        bare = [row.name for row in rows if getattr(row, field) is None]
        if 0 < len(bare) < len(rows):
            raise SettingsError(
                f"{key}: {metadata} has the column {column}, but no value for {some(bare)}; fill it in for all rows, "
                "or for none."
            )
    given = [name for name in FIELDS if getattr(rows[0], name) is not None]
    return pa.table({name: texts(getattr(row, name) for row in rows) for name in given})


def _with_stamps(rows: pa.Table, files: pa.Table, images: pa.Table, metadata: Path, key: str) -> pa.Table:
    """The rows of a metadata file with size and date of each of their files, all of which must exist."""
    folder, absent = metadata.parent, set[bytes]()
    listed: list[pa.ChunkedArray] = []
    for name in ("name", "mask", "control"):
        if name not in rows.column_names:
            continue
        prefix = "" if name == "name" else f"{name}_"
        names = rows.column(name)
        sizes, dates = _stamps(names, files, folder)
        absent |= {names[int(k)].as_py() for k in np.flatnonzero(sizes < 0)}
        rows = rows.append_column(f"{prefix}size", pa.array(sizes)).append_column(f"{prefix}date", pa.array(dates))
        listed += names.chunks
    if absent:
        raise SettingsError(
            f"{key}: {metadata} lists files that do not exist: {some([decoded(name) for name in sorted(absent)])}; "
            "paths are relative to the folder of that file: add the images, or remove their rows."
        )
    unlisted = images.filter(pc.invert(pc.is_in(images.column("name"), value_set=pa.chunked_array(listed))))
    if len(unlisted):
        named = _some_of(unlisted.column("name"))
        rank_zero_warn(f"{key}: left out images that {metadata} does not list: {named}.")
    return rows


def _stamps(names: pa.ChunkedArray, files: pa.Table, folder: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes and dates of files; -1 for those that do not exist. Hidden ones, say, are in no listing."""
    where = positions_in(files.column("name"), names)
    known = where >= 0
    sizes, dates = np.full(len(names), -1), np.full(len(names), -1)
    sizes[known], dates[known] = (numbers(files, name)[where[known]] for name in ("size", "date"))
    for k in np.flatnonzero(~known):
        path = folder / decoded(names[int(k)].as_py())
        if os.path.isfile(path):
            sizes[k], dates[k] = stamp(path)
    return sizes, dates
