"""Sources that only list their images: nothing of them is kept for later starts, so every start reads them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from typing_extensions import override

from sdmodule.data.example import Example, Examples
from sdmodule.data.index.columns import ExampleColumns, texts
from sdmodule.io.image_files import ImageFile


class PlainSource(Protocol):
    """Where captioned images are found; ``str`` gives its setting as ``key=value``."""

    @property
    def key(self) -> str:
        """Name of the setting that gave it."""
        ...

    def find(self) -> Examples:
        """All images with their captions, always in the same order."""
        ...

    def name_of(self, image: ImageFile) -> str:
        """The name of an image within the source."""
        ...


class ListedExamples(ExampleColumns):
    """The examples of a plain source.

    Args:
        source: the source.
    """

    def __init__(self, source: PlainSource) -> None:
        self.listed = source.find()
        images = (self.listed[row].path for row in range(len(self.listed)))
        super().__init__(pa.table({"name": texts(map(source.name_of, images))}))

    @override
    def example(self, row: int) -> Example:
        return self.listed[row]

    @override
    def name(self, row: int) -> str:
        return str(self.text("name", row))

    @override
    def keys(self) -> None:
        return None


class NoIndex:
    """In the place of a `SourceIndex`, for sources of which none is kept."""

    table: pa.Table | None = None

    def __init__(self) -> None:
        self.began = time.time_ns()

    def save(self, table: pa.Table) -> tuple[pa.Table, Path | None]:
        """The columns as they are."""
        return table, None
