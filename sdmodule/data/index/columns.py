"""Examples of a source in Arrow columns: a few buffers, in place of Python objects for every example.

Loading processes share the buffers, whose pages are never copied: unlike a Python object, an entry of a column has no
reference count that a read would change.

Columns that every source has are ``text`` (the caption), ``width`` and ``height`` (upright; 0 for an image that is not
known to be readable), ``content`` (the fingerprint of its bytes) and ``split`` (its place among all names in the order
of their SHA-256).
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdmodule.data.example import Example
from sdmodule.io.fingerprint import SIZE

TEXT = pa.large_binary()
"""Type of names and captions: UTF-8, in which lone surrogates, as of undecodable file names, have a place too."""

CONTENT = pa.binary(SIZE)

LEARNED = ("width", "height", "content", "split")
"""Columns that come from reading the images."""

STAMPS = ("size", "date", "offset", "mask_size", "mask_date", "control_size", "control_date")
"""Columns that change when a row's image, mask or control image may have changed: sizes, dates, places in a tar."""

CLOCK = 2 * 10**9
"""Nanoseconds within which a changed file may have the date that it had before: two seconds on FAT."""

ABOUT = b"sdmodule"
"""Key of the schema's metadata under which an index says what its rows do not."""


def encoded(text: str) -> bytes:
    """A text as a column holds it; the order of these bytes is the order of the texts."""
    return text.encode("utf-8", "surrogatepass")


def decoded(value: bytes) -> str:
    """The text of an entry."""
    return value.decode("utf-8", "surrogatepass")


def texts(values: Iterable[str | None]) -> pa.Array:
    """A column of texts."""
    return pa.array([None if value is None else encoded(value) for value in values], TEXT)


def numbers(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of numbers without missing ones, as an array over the same memory where it is in one piece."""
    return table.column(name).to_numpy()


def about(table: pa.Table) -> dict[str, Any]:
    """What a table says about all of its rows, such as ``checked``, the time of the start that made it."""
    return json.loads((table.schema.metadata or {}).get(ABOUT, b"{}"))


def with_about(table: pa.Table, **values: Any) -> pa.Table:
    """The table with further values in `about`."""
    return table.replace_schema_metadata({ABOUT: json.dumps({**about(table), **values})})


def same_columns(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables hold the same, whenever they were made."""
    made = ("checked", "generation")
    facts = ({name: value for name, value in about(table).items() if name not in made} for table in (one, other))
    return one.equals(other) and next(facts) == next(facts)


def merged(old: pa.Array | pa.ChunkedArray, positions: NDArray[Any], new: Mapping[int, Any]) -> pa.Array:
    """A column with the old entry at each of the positions, but new ones at some of the places.

    Args:
        old: the old column.
        positions: for each place the position of its entry in ``old``; of no account where there is a new one.
        new: new entries by place.
    """
    whole = old.combine_chunks() if isinstance(old, pa.ChunkedArray) else old
    if isinstance(whole, pa.ChunkedArray):
        whole = pa.concat_arrays(whole.chunks)
    places = np.array(positions)
    places[list(new)] = len(whole) + np.arange(len(new))
    return pa.concat_arrays([whole, pa.array(list(new.values()), whole.type)]).take(pa.array(places))


def split_order(names: Iterable[bytes]) -> NDArray[np.int64]:
    """The place of each name among all different ones in the order of their SHA-256."""
    digests = b"".join(hashlib.sha256(name).digest() for name in names)
    words = np.frombuffer(digests, ">u8").reshape(-1, 4)
    order = np.lexsort(words.T[::-1])
    new = np.ones(len(order), bool)
    new[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    places = np.empty(len(order), np.int64)
    places[order] = new.cumsum() - 1
    return places


class ExampleColumns(Sequence[Example]):
    """Examples of a source, one a row; see the module for the columns.

    Args:
        table: the columns.
        file: the file that they are mapped from, if there is one.
    """

    def __init__(self, table: pa.Table, file: Path | None = None) -> None:
        self.table = table.combine_chunks()
        self.file = file
        self.about = about(table)
        self._columns = {name: _in_one(self.table.column(name)) for name in self.table.column_names}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        position = int(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.example(position)

    @abstractmethod
    def example(self, row: int) -> Example:
        """The example in a row."""

    @abstractmethod
    def name(self, row: int) -> str:
        """The name of a row's image within its source, by which it is chosen for validation."""

    @abstractmethod
    def keys(self) -> pa.Array | None:
        """What identifies a row in another start's columns, whatever its place; None if its place does."""

    def value(self, name: str, row: int) -> Any:
        """An entry."""
        return self._columns[name][row].as_py()

    def text(self, name: str, row: int) -> str | None:
        """An entry of a column of texts; None if it is missing, or the whole column."""
        if name not in self._columns:
            return None
        value = self.value(name, row)
        return None if value is None else decoded(value)

    def replaced(self, table: pa.Table, file: Path | None = None) -> ExampleColumns:
        """Examples of the same source with other columns."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        ExampleColumns.__init__(other, table, file)
        return other

    def caption(self, row: int) -> str:
        """The caption of an image."""
        return self.example(row).caption

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of an image, upright."""
        return self.value("width", row), self.value("height", row)

    def sizes(self) -> NDArray[np.int32]:
        """Width and height of all images, upright, ``[N, 2]``."""
        return np.stack([numbers(self.table, "width"), numbers(self.table, "height")], 1)

    def content(self, row: int) -> str:
        """The fingerprint of an image's bytes."""
        return self.value("content", row).hex()

    def split(self) -> NDArray[np.int64]:
        """The places of all images in the order of their names' SHA-256."""
        return numbers(self.table, "split")

    def ordered(self) -> NDArray[np.int64]:
        """What `split` is, computed from the names."""
        return split_order(os.fsencode(self.name(row)) for row in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        # a process that is not forked maps the file itself, unless another start has replaced it
        state = {name: value for name, value in self.__dict__.items() if name not in ("_columns", "about")}
        if self.file is not None and about(self.table).get("generation") == _generation(self.file):
            state["table"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        ExampleColumns.__init__(self, mapped(state["file"]) if state["table"] is None else state["table"], self.file)


def _in_one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def mapped(file: Path) -> pa.Table:
    """The columns in a file, mapped into memory.

    Raises:
        OSError: if there is none.
        pyarrow.ArrowInvalid: if it is damaged.
    """
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _generation(file: Path) -> str | None:
    try:
        return about(pa.ipc.open_file(pa.memory_map(str(file))).schema.empty_table()).get("generation")
    except (OSError, pa.ArrowInvalid):
        return None


def positions_in(old: pa.Array | pa.ChunkedArray, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """For each key its first position in an older column; -1 where it is not there."""
    found = pc.index_in(keys, value_set=old)
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
