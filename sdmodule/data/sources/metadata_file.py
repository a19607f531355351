"""The metadata file of a folder: ``metadata.jsonl`` or ``metadata.csv``, a row for each image."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdmodule.errors import SettingsError, choices, count_of

EXTRA_COLUMNS = {"mask_file_name": "mask", "conditioning_image_file_name": "control"}
"""Metadata columns that name an image's other files, and their fields of `Row`."""


class Row(NamedTuple):
    """A row of a metadata file, its files relative to the folder."""

    name: str
    text: str
    mask: str | None = None
    control: str | None = None


def read_text(path: Path, key: str) -> str:
    """The text of a file.

    Raises:
        SettingsError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{key}: {path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def has_extra_columns(metadata: Path, key: str) -> bool:
    """Whether a metadata file names masks or control images."""
    return any(row.get(column) for _, row in _rows(metadata, key) for column in EXTRA_COLUMNS)


def _rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Line numbers and rows of a ``metadata.jsonl`` or ``metadata.csv``."""
    return (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path, key)


def read_metadata(path: Path, key: str, prompt: str | None = None) -> list[Row]:
    """The rows of a metadata file, sorted by path and caption; a ``prompt`` replaces every caption.

    Raises:
        SettingsError: for a row that is malformed, or names a file outside the folder.
    """
    rows = []
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
        extra: dict[str, str] = {}
        for column, field in EXTRA_COLUMNS.items():
            if file := row.get(column):
                if not isinstance(file, str):
                    raise SettingsError(f"{where} has {column}={file!r}; it must be a string.")
                extra[field] = _name_within(path.parent, file, where)
        rows.append(Row(_name_within(path.parent, name, where), text, **extra))
    return sorted(rows, key=lambda row: (row.name.split("/"), row.text))


def _name_within(folder: Path, name: str, where: str) -> str:
    """The relative path of a file that a row names; it must lie in the folder."""
    file = Path(os.path.normpath(folder / name))
    if not file.is_relative_to(folder):
        raise SettingsError(f"{where} names {name}, which is outside the folder; move the image into {folder}.")
    return str(file.relative_to(folder))


def _jsonl_rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(read_text(path, key).split("\n"), start=1):
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
    reader = csv.DictReader(io.StringIO(read_text(path, key), newline=""), strict=True)
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
