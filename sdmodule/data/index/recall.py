"""What earlier starts have learned about the images of a source, as far as it still holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdmodule.data.index.columns import (
    CLOCK,
    CONTENT,
    STAMPS,
    ExampleColumns,
    about,
    numbers,
    positions_in,
    with_about,
)
from sdmodule.io.fingerprint import SIZE


@dataclass
class Learned:
    """What is known of N images.

    Attributes:
        size: width and height, upright, ``[N, 2]``; 0 for an image that has to be read.
        content: fingerprints of their bytes, ``[N, 16]``.
        split: their places in the order of their names' SHA-256, ``[N]``.
        suspects: of images that were readable and may have changed since: what their size was.
    """

    size: NDArray[np.int32]
    content: NDArray[np.uint8]
    split: NDArray[np.int64] | None = None
    suspects: dict[int, tuple[int, int]] = field(default_factory=dict)

    def written_to(self, examples: ExampleColumns, checked: int) -> pa.Table:
        """The columns of the examples with these; ``checked`` is the time of the start."""
        if self.split is None:
            self.split = examples.ordered()
        table = examples.table
        contents = pa.py_buffer(self.content.tobytes())
        columns: dict[str, Any] = {
            "width": pa.array(self.size[:, 0]),
            "height": pa.array(self.size[:, 1]),
            "content": pa.FixedSizeBinaryArray.from_buffers(CONTENT, len(self.content), [None, contents]),
            "split": pa.array(self.split),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return with_about(table, checked=checked)


def recall(found: ExampleColumns, known: ExampleColumns | None, compare_all: bool = False) -> Learned:
    """What is known of images, as far as sizes and dates of their files say that it still holds.

    An image whose date has changed, or is so young that a later change may have left it as it was, is in doubt; its
    content decides, if its size is the same.

    Args:
        found: the images.
        known: the columns of an earlier start, with what it learned.
        compare_all: doubt every image.
    """
    count = len(found)
    learned = Learned(np.zeros((count, 2), np.int32), np.zeros((count, SIZE), np.uint8))
    if known is None:
        return learned
    keys, known_keys = found.keys(), known.keys()
    if keys is None or known_keys is None:
        positions = np.where(np.arange(count) < len(known), np.arange(count), -1)
        in_place = count == len(known)
    else:
        positions = positions_in(known_keys, keys)
        in_place = keys.equals(known_keys)
    if in_place:
        learned.split = known.split()
    sizes = known.sizes()[positions]
    candidates = (positions >= 0) & (sizes[:, 0] > 0)
    same, dates, beside = _comparison(found.table, known.table, positions)
    certain = candidates & same & dates & beside & (not compare_all)
    learned.size[certain] = sizes[certain]
    # of a suspect, too, the content that it had
    learned.content[candidates] = _bytes(known.table.column("content"))[positions[candidates]]
    doubtful = np.flatnonzero(candidates & ~certain & same & beside)
    learned.suspects = {
        row: (width, height) for row, (width, height) in zip(doubtful.tolist(), sizes[doubtful].tolist())
    }
    return learned


def _comparison(found: pa.Table, known: pa.Table, positions: NDArray[np.int64]) -> tuple[NDArray[np.bool_], ...]:
    """Whether each image has the size, and the date, that it had, and its mask and control image both."""
    same, dates, beside = (np.ones(len(positions), bool) for _ in range(3))
    if about(found).get("version") != about(known).get("version"):
        dates[:] = False
    settled = about(known).get("checked", 0) - CLOCK
    for name in STAMPS:
        if name not in found.column_names and name not in known.column_names:
            continue
        equal = beside if name.startswith(("mask", "control")) else dates if name in ("date", "offset") else same
        if name not in found.column_names or name not in known.column_names:
            equal[:] = False
            continue
        values = numbers(found, name)
        equal &= values == numbers(known, name)[positions]
        if name.endswith("date"):
            equal &= values < settled
    return same, dates, beside


def _bytes(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """A column of contents as ``[N, 16]`` bytes."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, SIZE)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
    ]
    return np.concatenate(parts) if len(parts) != 1 else parts[0]
