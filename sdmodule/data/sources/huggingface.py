"""Images in a data set of Hugging Face: from the hub, or a folder that the package ``datasets`` reads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sdmodule.data.sources.folder import Example, Examples
from sdmodule.errors import SettingsError, choices
from sdmodule.io.image_files import ImageFile
from sdmodule.ranges import check_place

TEXTS = ("string", "large_string", "string_view")
BYTES = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True)
class HuggingFaceData:
    """A split of a data set with a column of images and one of captions.

    The rows stay on disk, mapped into memory; no code that a data set brings along is run.

    Args:
        name: a hub id; a folder of parquet or other files, of images, or one that ``save_to_disk`` wrote.
        split: which part of it.
        subset: which of its configurations, where it has several.
        revision: branch, tag or commit of a hub id.
        image_column: of images, or of the bytes of their files.
        caption_column: of texts.
        key: the setting that gave it, for the messages.

    Raises:
        SettingsError: for a name that is no text.
    """

    name: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    key: str = "data.name"

    def __post_init__(self) -> None:
        check_place(self.key, self.name)

    def __str__(self) -> str:
        return f"{self.key}={self.name} split={self.split}"

    def find(self) -> Examples:
        """The rows, in their order."""
        rows = self._load()
        import datasets

        for setting in ("image_column", "caption_column"):
            if (column := getattr(self, setting)) not in rows.column_names:
                raise SettingsError(
                    f"data.{setting}={column} is no column of {self}; it has {choices(rows.column_names)}."
                )
        rows = rows.select_columns([self.image_column, self.caption_column])
        images, captions = rows.features[self.image_column], rows.features[self.caption_column]
        if isinstance(images, datasets.Image):
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        elif not _holds_bytes(images):
            raise SettingsError(
                f"data.image_column={self.image_column} of {self} holds {images}; give a column of images."
            )
        if getattr(captions, "dtype", None) not in TEXTS:
            raise SettingsError(
                f"data.caption_column={self.caption_column} of {self} holds {captions}; give a column of texts."
            )
        if not len(rows):
            raise SettingsError(f"{self} has no rows; give a split with images.")
        return _Rows(rows, self)

    def called(self, image: ImageFile) -> str:
        """The number of the image's row."""
        assert isinstance(image, Cell)
        return f"row {image.number}"

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise SettingsError(f"{self} needs the package datasets; pip install 'sdmodule[datasets]'.") from error
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
            place = str(folder) if folder.exists() else self.name
            return datasets.load_dataset(place, self.subset, split=self.split, revision=self.revision)
        except Exception as error:  # of datasets, of the hub, of pyarrow, of the HTTP client
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise SettingsError(
                f"{self} cannot be loaded ({reason}); give a hub id or a folder that the package datasets reads, and "
                "data.split and data.subset of it."
            ) from error


class Cell(NamedTuple):
    """An image in a row of a data set."""

    rows: Any
    number: int
    place: HuggingFaceData

    def read(self) -> bytes:
        """The bytes of its file."""
        value = self.rows[self.number][self.place.image_column]
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"] and Path(value["path"]).read_bytes()
        if not value:
            raise ValueError("it holds no image")
        return value

    def __str__(self) -> str:
        return f"row {self.number} of {self.place}"


class _Rows:
    """Rows of a data set as examples."""

    def __init__(self, rows: Any, place: HuggingFaceData) -> None:
        self.images = rows.select_columns([place.image_column])
        self.captions = rows.select_columns([place.caption_column])
        self.place = place

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Example:
        image = Cell(self.images, index, self.place)
        caption = self.captions[index][self.place.caption_column]
        if caption is None:
            raise SettingsError(
                f"data.caption_column={self.place.caption_column} holds nothing in {image}; give it a text."
            )
        return Example(image, caption)


def _holds_bytes(feature: Any) -> bool:
    """Whether a column holds files' bytes, alone or as the pair of bytes and path that images are stored as."""
    value = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(value, "dtype", None) in BYTES
