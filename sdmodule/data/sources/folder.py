"""A folder of images, with captions in a metadata file or in a ``.txt`` beside each image."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.data.example import Example, Examples
from sdmodule.errors import SettingsError, check_path, choices, count_of
from sdmodule.io.image_files import SUFFIXES, UNREAD_SUFFIXES, ImageFile

EXTRA_COLUMNS = {"mask_file_name": "mask", "conditioning_image_file_name": "control"}
"""Metadata columns that name an image's other files, and their fields of `Example`."""


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

    def find(self) -> Examples:
        """The images, sorted by name."""
        return find_examples(self.root, self.key, self.prompt)

    def name_of(self, image: ImageFile) -> str:
        """The image's path relative to the folder."""
        return os.path.relpath(str(image), absolute(self.root))


def find_examples(root: str | Path, key: str = "data.root", prompt: str | None = None) -> list[Example]:
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

    Raises:
        SettingsError: if the folder or its captions are missing, incomplete or malformed.
    """
    folder = absolute(root)
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise SettingsError(f"{key}={root}: {problem}; give a folder of images with captions.")
    files = set(all_files(folder))
    images = {path for path in files if path.suffix.lower() in SUFFIXES}
    _report_unread(files, folder, key)
    metadata = next((file for name in ("metadata.jsonl", "metadata.csv") if (file := folder / name).is_file()), None)
    if prompt is not None and images and not (metadata and _has_extra_columns(metadata, key)):
        return [Example(path, prompt) for path in sorted(images)]
    if metadata is None:
        if not images:
            raise SettingsError(f"{key}={root}: contains no images; images end in {choices(SUFFIXES)}.")
        return _read_sidecars(sorted(images), files, folder, key)

    examples = sorted(_read_metadata(metadata, key, prompt), key=lambda example: example[:2])
    if not examples:
        raise SettingsError(f"{key}: {metadata} lists no images; add a row with file_name and text for each image.")
    for column, field in EXTRA_COLUMNS.items():
        bare = [example.path for example in examples if getattr(example, field) is None]
        if 0 < len(bare) < len(examples):
            raise SettingsError(
                f"{key}: {metadata} has the column {column}, but no value for {some(_names(bare, folder))}; fill it in "
                "for all rows, or for none."
            )
    listed = {path for example in examples for path in example.files if isinstance(path, Path)}
    if absent := sorted(path for path in listed if not os.path.isfile(path)):
        raise SettingsError(
            f"{key}: {metadata} lists files that do not exist: {some(_names(absent, folder))}; paths are relative to "
            "the folder of that file: add the images, or remove their rows."
        )
    if unlisted := sorted(images - listed):
        names = some(_names(unlisted, folder))
        rank_zero_warn(f"{key}: left out images that {metadata} does not list: {names}.")
    return examples


def absolute(root: str | Path) -> Path:
    """The absolute path of a folder; links are not followed, since images may be links to files elsewhere."""
    return Path(os.path.abspath(Path(root).expanduser()))


def image_files(folder: Path) -> set[Path]:
    """All files in a folder and its subfolders with the suffix of an image, but hidden ones."""
    return {path for path in all_files(folder) if path.suffix.lower() in SUFFIXES}


def all_files(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, linked ones too, but hidden ones.

    A folder that is reached a second time, as by a link to its own parent, is not entered again.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            rank_zero_warn(f"{place} leads to a folder that is read already, {real}, and is left out.")
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _report_unread(files: Iterable[Path], folder: Path, key: str) -> None:
    """Name the images of kinds that cannot be read, which are left out."""
    unread = sorted(path for path in files if path.suffix.lower() in UNREAD_SUFFIXES)
    if unread:
        rank_zero_warn(
            f"{key}: left out {len(unread)} images of kinds that are not read: {some(_names(unread, folder))}; "
            "convert them to PNG or JPEG."
        )


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and the number of the others."""
    first = ", ".join(names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


def _names(files: Iterable[ImageFile], folder: Path) -> list[str]:
    return [os.path.relpath(str(file), folder) for file in files]


def _read_sidecars(images: Sequence[Path], files: Iterable[Path], folder: Path, key: str) -> list[Example]:
    """The images, each with the caption in the ``.txt`` beside it, whatever the case of that suffix."""
    captions = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    if bare := [path for path in images if path.with_suffix("") not in captions]:
        raise SettingsError(
            f"{key}={folder}: images without a caption: {some(_names(bare, folder))}; put a metadata.jsonl "
            "or metadata.csv (file_name, text) into the folder, or a .txt beside each image."
        )
    used = {path.with_suffix("") for path in images}
    if lone := sorted(path for stem, path in captions.items() if stem not in used):
        rank_zero_warn(f"{key}: {len(lone)} captions have no image: {some(_names(lone, folder))}.")
    return [Example(path, _read_text(captions[path.with_suffix("")], key).strip()) for path in images]


def _read_text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{key}: {path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def _has_extra_columns(metadata: Path, key: str) -> bool:
    """Whether a metadata file names masks or control images."""
    return any(row.get(column) for _, row in _rows(metadata, key) for column in EXTRA_COLUMNS)


def _rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Line numbers and rows of a ``metadata.jsonl`` or ``metadata.csv``."""
    return (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path, key)


def _read_metadata(path: Path, key: str, prompt: str | None = None) -> Iterator[Example]:
    """The examples that a metadata file lists; a ``prompt`` replaces every caption."""
    for line, row in _rows(path, key):
        where = f"{key}: {path}, line {line}"
        if prompt is not None:
            row["text"] = prompt
        if missing := {"file_name", "text"} - row.keys():
            raise SettingsError(
                f"{where} has no {choices(missing)}, only {choices(map(str, row))}; file_name and text are required."
            )
        name, text = row["file_name"], row["text"]
        if not isinstance(name, str) or not isinstance(text, str):
            raise SettingsError(f"{where} has file_name={name!r} and text={text!r}; both must be strings.")
        extra: dict[str, Any] = {}
        for column, field in EXTRA_COLUMNS.items():
            if file := row.get(column):
                if not isinstance(file, str):
                    raise SettingsError(f"{where} has {column}={file!r}; it must be a string.")
                extra[field] = _path_within(path.parent, file, where)
        yield Example(_path_within(path.parent, name, where), text, **extra)


def _path_within(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a row names; it must lie in the folder."""
    file = Path(os.path.normpath(folder / name))
    if not file.is_relative_to(folder):
        raise SettingsError(f"{where} names {name}, which is outside the folder; move the image into {folder}.")
    return file


def _jsonl_rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(_read_text(path, key).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingsError(
                f"{key}: {path}, line {number} is not JSON ({error}); write one object per line."
            ) from error
        if not isinstance(row, dict):
            raise SettingsError(
                f"{key}: {path}, line {number} is {line.strip()}; write an object with file_name and text."
            )
        yield number, row


def _csv_rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    # a StringIO ends lines as the csv module does: not at a form feed or U+2028, as str.splitlines would
    reader = csv.DictReader(io.StringIO(_read_text(path, key), newline=""), strict=True)
    try:
        for row in reader:
            _check_fields(row, reader, f"{key}: {path}, line {reader.line_num}")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise SettingsError(f"{key}: {path}, line {reader.line_num} is not CSV ({error}); check its quotes.") from error


def _check_fields(row: Mapping[Any, Any], reader: csv.DictReader, where: str) -> None:
    """Check that a row has as many fields as the header; a comma in a caption without quotes makes one more."""
    names = reader.fieldnames or []
    given = len(names) + len(row.get(None, ())) - sum(row[name] is None for name in names)
    if given != len(names):
        raise SettingsError(
            f"{where} has {count_of(given, 'field')}, and the header has {len(names)}; put a caption with a comma in "
            "double quotes."
        )
