"""Images in a data set of Hugging Face: on the hub, or in a folder that the package ``datasets`` reads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from typing_extensions import override

from sdmodule.data.example import Example
from sdmodule.data.index.columns import TEXT, ExampleColumns, about, decoded, texts, with_about
from sdmodule.errors import SettingsError, check_path, choices
from sdmodule.io.image_files import ImageFile

STRING_TYPES = ("string", "large_string", "string_view")
AT_ONCE = 4096
"""Captions that are read at a time."""

BINARY_TYPES = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True)
class HuggingFaceData:
    """A split of a data set with a column of images and one of captions.

    The rows stay on disk, mapped into memory. Code that comes with a data set is never run.

    Args:
        name: a hub id; or a folder of parquet or other files, of images, or written by ``save_to_disk``.
        split: the split.
        subset: the configuration, if the data set has several.
        revision: branch, tag or commit of a hub id.
        image_column: the column of images, or of the bytes of image files.
        caption_column: the column of captions.
        key: name of the setting that gave it, for messages.

    Raises:
        SettingsError: for a name that is no string.
    """

    name: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    key: str = "data.name"

    def __post_init__(self) -> None:
        check_path(self.key, self.name)

    def __str__(self) -> str:
        return f"{self.key}={self.name} split={self.split}"

    def place(self) -> tuple[object, ...]:
        """What identifies the source, wherever a run is started."""
        folder = Path(self.name).expanduser()
        name = folder.absolute() if folder.exists() else self.name
        return "rows", name, self.split, self.subset, self.revision, self.image_column, self.caption_column

    def find(self, known: pa.Table | None = None) -> RowExamples:
        """The rows, in their order.

        Args:
            known: what an earlier start has found; of an unchanged data set the captions are not read again.

        Raises:
            SettingsError: if the data set cannot be loaded, is empty, or its columns hold something else.
        """
        rows = self._load()
        import datasets

        for setting in ("image_column", "caption_column"):
            if (column := getattr(self, setting)) not in rows.column_names:
                raise SettingsError(
                    f"data.{setting}={column}: is not a column of {self}; choose one of {choices(rows.column_names)}."
                )
        rows = rows.select_columns([self.image_column, self.caption_column])
        images, captions = rows.features[self.image_column], rows.features[self.caption_column]
        if isinstance(images, datasets.Image):
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        elif not _holds_bytes(images):
            raise SettingsError(
                f"data.image_column={self.image_column}: contains {images} in {self}; give a column of images."
            )
        if getattr(captions, "dtype", None) not in STRING_TYPES:
            raise SettingsError(
                f"data.caption_column={self.caption_column}: contains {captions} in {self}; give a column of strings."
            )
        if not len(rows):
            raise SettingsError(f"{self}: has no rows; give a split with images.")
        images, captions = rows.select_columns([self.image_column]), rows.select_columns([self.caption_column])
        version = images._fingerprint
        if known is not None and about(known).get("version") == version and len(known) == len(rows):
            table = known.select(["text"])
        else:
            table = pa.table({"text": self._captions(captions)})
        return RowExamples(with_about(table, version=version), images, self)

    def held(self, known: pa.Table) -> RowExamples:
        """The rows that columns hold the captions of."""
        return self.find(known)

    def _captions(self, rows: Any) -> pa.ChunkedArray:
        """The captions of all rows.

        Raises:
            SettingsError: if one has none.
        """
        parts = []
        for start in range(0, len(rows), AT_ONCE):
            captions = rows[start : start + AT_ONCE][self.caption_column]
            if None in captions:
                raise SettingsError(
                    f"data.caption_column={self.caption_column}: is empty in row {start + captions.index(None)} of "
                    f"{self}; give every row a caption."
                )
            parts.append(texts(captions))
        return pa.chunked_array(parts, TEXT)

    def name_of(self, image: ImageFile) -> str:
        """The number of the image's row."""
        assert isinstance(image, StoredRow)
        return f"row {image.number}"

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise SettingsError(f"{self}: needs the package datasets; pip install 'sdmodule[datasets]'.") from error
        datasets.utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        folder = Path(self.name).expanduser()
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                stored = datasets.load_from_disk(str(folder))
                splits = stored if isinstance(stored, dict) else {str(stored.split or self.split): stored}
                if self.split not in splits:
                    raise ValueError(f"it has the splits {choices(splits)}")
                return splits[self.split]
            path = str(folder) if folder.exists() else self.name
            return datasets.load_dataset(path, self.subset, split=self.split, revision=self.revision)
        except Exception as error:  # from datasets, the hub, pyarrow, or the HTTP client
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise SettingsError(
                f"{self}: cannot be loaded ({reason}); give a hub id or a folder that the package datasets reads, and "
                "one of its splits and subsets as data.split and data.subset."
            ) from error


class StoredRow(NamedTuple):
    """The image in a row of a data set."""

    rows: Any
    number: int
    source: HuggingFaceData

    def read(self) -> bytes:
        """The bytes of the image file."""
        value = self.rows[self.number][self.source.image_column]
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"] and Path(value["path"]).read_bytes()
        if not value:
            raise ValueError("the row has no image")
        return value

    def identity(self) -> str:
        """The fingerprint that ``datasets`` gives its rows, and the number of this one."""
        return f"{self.rows._fingerprint} {self.number}"

    def __str__(self) -> str:
        return f"row {self.number} of {self.source}"


class RowExamples(ExampleColumns):
    """The rows of a data set as examples; their images stay in the data set.

    Args:
        table: the captions and what is known of the images.
        rows: the images.
        source: the data set.
    """

    def __init__(self, table: pa.Table, rows: Any, source: HuggingFaceData) -> None:
        super().__init__(table)
        self.rows = rows
        self.source = source

    @override
    def example(self, row: int) -> Example:
        return Example(StoredRow(self.rows, row, self.source), decoded(self.value("text", row)))

    @override
    def name(self, row: int) -> str:
        return f"row {row}"

    @override
    def keys(self) -> None:
        return None


def _holds_bytes(feature: Any) -> bool:
    """Whether a column holds the bytes of files, alone or as the pair of bytes and path that ``datasets`` stores."""
    value = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(value, "dtype", None) in BINARY_TYPES
