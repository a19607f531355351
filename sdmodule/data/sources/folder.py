"""Which images a folder holds and what their captions are: metadata files, or a ``.txt`` beside each image."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.errors import SettingsError, choices
from sdmodule.io.image_files import SUFFIXES, ImageFile


class CaptionStyle(NamedTuple):
    """What becomes of a caption in training: its tags, the parts between commas, are shuffled and it is put in a text.

    The first ``keep_tags`` tags stay where they are; ``{}`` in a template is the caption's place. Of several templates
    one is drawn each time.
    """

    templates: tuple[str, ...] = ()
    shuffle_tags: bool = False
    keep_tags: int = 0

    def text(self, caption: str, rng: random.Random | None) -> str:
        """The caption in this style; where there is no ``rng``, tags stay in order and the first template is taken."""
        if self.shuffle_tags and rng is not None:
            tags = [tag.strip() for tag in caption.split(",")]
            first, others = tags[: self.keep_tags], tags[self.keep_tags :]
            rng.shuffle(others)
            caption = ", ".join(first + others)
        if not self.templates:
            return caption
        template = self.templates[0] if rng is None or len(self.templates) == 1 else rng.choice(self.templates)
        return template.replace("{}", caption)


class Example(NamedTuple):
    """An image's file, its caption and, where it has them, the files of its mask and of its control image."""

    path: ImageFile
    caption: str
    mask: Path | None = None
    style: CaptionStyle = CaptionStyle()
    control: Path | None = None

    @property
    def files(self) -> list[ImageFile]:
        """All of its files."""
        return [file for file in (self.path, self.mask, self.control) if file is not None]


BESIDE = {"mask_file_name": "mask", "conditioning_image_file_name": "control"}
"""Columns of metadata that name what belongs to an image, and what that is of an `Example`."""


class Examples(Protocol):
    """Examples by number; they may be looked up only when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def find_examples(root: str | Path, key: str = "data.root", prompt: str | None = None) -> list[Example]:
    """List a folder's images with their captions, sorted by name; the images are not opened.

    Captions come from the first of these that exists: ``metadata.jsonl``, ``metadata.csv`` (columns ``file_name``,
    relative to the folder, and ``text``), or a ``.txt`` beside each image. Subfolders count; hidden files do not.
    Images that a metadata file does not name are left out, with a warning. A column ``mask_file_name``, if there is
    one, names each image's mask, and ``conditioning_image_file_name`` its control image.

    Args:
        root: the folder.
        key: the setting that gave the folder, for the messages.
        prompt: the caption of all images, which then need none of their own; masks and control images that metadata
            names are none of them.

    Raises:
        SettingsError: if the folder or its captions are missing, incomplete or malformed.
    """
    folder = absolute(root)
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise SettingsError(f"{key}={root} {problem}; give a folder of images with captions.")
    images = image_files(folder)
    metadata = next((file for name in ("metadata.jsonl", "metadata.csv") if (file := folder / name).is_file()), None)
    if prompt is not None and images and not (metadata and names_more(metadata, key)):
        return [Example(path, prompt) for path in sorted(images)]
    if metadata is None:
        if not images:
            raise SettingsError(f"{key}={root} holds no images; images end in {choices(SUFFIXES)}.")
        return _read_sidecars(sorted(images), folder, key)

    examples = sorted(_read_metadata(metadata, key, prompt), key=lambda example: example[:2])
    if not examples:
        raise SettingsError(f"{key}: {metadata} names no images; give it a row with file_name and text for each.")
    for column, field in BESIDE.items():
        bare = [example.path for example in examples if getattr(example, field) is None]
        if 0 < len(bare) < len(examples):
            raise SettingsError(
                f"{key}: {metadata} has the column {column}, but nothing in it for {some(_names(bare, folder))}; fill "
                "it in all rows, or in none."
            )
    named = {path for example in examples for path in example.files if isinstance(path, Path)}
    if absent := sorted(path for path in named if not os.path.isfile(path)):
        raise SettingsError(
            f"{key}: {metadata} names images that do not exist: {some(_names(absent, folder))}; "
            "file_name is relative to the folder of that file: add the images or remove their rows."
        )
    if unnamed := sorted(images - named):
        left_out = some(_names(unnamed, folder))
        rank_zero_warn(f"{key}: left out {len(unnamed)} images not named in {metadata}: {left_out}.")
    return examples


def absolute(root: str | Path) -> Path:
    """Tidy a path without following links: images may be links to files elsewhere."""
    return Path(os.path.abspath(Path(root).expanduser()))


def image_files(folder: Path) -> set[Path]:
    """The files of a folder, and of those in it, that end as images do."""
    return {path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not _hidden(path, folder)}


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def some(names: Sequence[str], limit: int = 3) -> str:
    """Name the first few of ``names`` and count the rest."""
    named = ", ".join(names[:limit])
    return named if len(names) <= limit else f"{named} and {len(names) - limit} more"


def _names(files: Iterable[ImageFile], folder: Path) -> list[str]:
    return [os.path.relpath(str(file), folder) for file in files]


def _read_sidecars(images: Sequence[Path], folder: Path, key: str) -> list[Example]:
    """Read the ``.txt`` beside each image."""
    if bare := [path for path in images if not path.with_suffix(".txt").is_file()]:
        raise SettingsError(
            f"{key}={folder} has {len(bare)} images without a caption: {some(_names(bare, folder))}; "
            "put a metadata.jsonl or metadata.csv (file_name, text) in the folder, or a .txt beside each image."
        )
    return [Example(path, _read_text(path.with_suffix(".txt"), key).strip()) for path in images]


def _read_text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{key}: {path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def names_more(metadata: Path, key: str) -> bool:
    """Whether metadata names masks or control images."""
    return any(row.get(column) for _, row in _rows(metadata, key) for column in BESIDE)


def _rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    return (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path, key)


def _read_metadata(path: Path, key: str, prompt: str | None = None) -> Iterator[Example]:
    """Read the rows of a ``metadata.jsonl`` or ``metadata.csv``; a ``prompt`` stands for every text."""
    for line, row in _rows(path, key):
        where = f"{key}: {path}, line {line}"
        if prompt is not None:
            row["text"] = prompt
        if missing := {"file_name", "text"} - row.keys():
            raise SettingsError(
                f"{where} has no {choices(missing)}, only {choices(map(str, row))}; file_name and text are needed."
            )
        name, text = row["file_name"], row["text"]
        if not isinstance(name, str) or not isinstance(text, str):
            raise SettingsError(f"{where} has file_name={name!r} and text={text!r}; both must be strings.")
        beside: dict[str, Any] = {}
        for column, field in BESIDE.items():
            if file := row.get(column):
                if not isinstance(file, str):
                    raise SettingsError(f"{where} has {column}={file!r}; give a string.")
                beside[field] = _within(path.parent, file, where)
        yield Example(_within(path.parent, name, where), text, **beside)


def _within(folder: Path, name: str, where: str) -> Path:
    """The file of a folder that a row names."""
    file = Path(os.path.normpath(folder / name))
    if not file.is_relative_to(folder):
        raise SettingsError(f"{where} names {name}, outside the folder; move the image into {folder}.")
    return file


def _jsonl_rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(_read_text(path, key).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{key}: {path}, line {number} is no JSON ({error}); write objects.") from error
        if not isinstance(row, dict):
            raise SettingsError(f"{key}: {path}, line {number} is {line.strip()}; write an object with both columns.")
        yield number, row


def _csv_rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(_read_text(path, key).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise SettingsError(f"{key}: {path}, line {reader.line_num} is no CSV ({error}); check its quotes.") from error
