"""The folder of a run: its layout, its records, and how what an earlier run left there is moved aside."""

from __future__ import annotations

import errno
import itertools
import json
import os
from array import array
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from sdmodule.errors import is_int, unwritable
from sdmodule.io.atomic import atomic_write
from sdmodule.io.index_set import IndexSet

IMAGES, INPUTS, RECORDS, TIMINGS = "images", "inputs", "predictions.jsonl", "timings.json"
EVALUATION, GRID, PAGE = "evaluation.json", "grid.png", "index.html"
CONFIG, METRICS, SAMPLES, REPORT = "config.yaml", "metrics.csv", "samples", "report.json"
OPEN_FILES = 64
"""Largest number of files of records that are open at once."""

TRAINED = ("checkpoints", SAMPLES, "export", METRICS)


def set_aside_images(folder: Path) -> Path | None:
    """Rename the images, the records and the evaluation of an earlier predict run, with the next free number.

    Returns:
        The images' new folder; None if there are none.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    if not any((folder / IMAGES).glob("*.png")):
        return None
    return _set_aside(folder, (IMAGES, RECORDS, EVALUATION))[0]


def set_aside_training(folder: Path, ckpt_path: str | None) -> list[Path]:
    """Rename what an earlier training left in a folder, with the next free number, unless that is what goes on.

    Args:
        folder: of the run.
        ckpt_path: the checkpoint that the training resumes from.

    Returns:
        The new paths; empty if there was no training.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    if ckpt_path is not None and _is_of_this_run(Path(ckpt_path).resolve(), folder.resolve()):
        return []
    if not any((folder / name).exists() for name in TRAINED):
        return []
    return _set_aside(folder, (*TRAINED, TIMINGS, CONFIG, PAGE, REPORT))


def _is_of_this_run(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint lies in the folder, and not among those that were moved aside there."""
    return checkpoint.is_relative_to(folder) and not checkpoint.relative_to(folder).parts[0].startswith("checkpoints-")


def _set_aside(folder: Path, names: Sequence[str]) -> list[Path]:
    """Rename those of the files and folders that exist, all with the smallest number that is free for each."""
    forms = {name: f"{Path(name).stem}-{{}}{Path(name).suffix}" for name in names}
    number = next_free(folder, *forms.values())
    moved = []
    for name, form in forms.items():
        if (folder / name).exists():
            target = folder / form.format(number)
            try:
                (folder / name).rename(target)
            except OSError as error:
                raise unwritable(folder, error.strerror) from error
            moved.append(target)
    return moved


def next_free(folder: Path, *forms: str) -> int:
    """The smallest number with which none of these names exists in a folder, such as ``metrics-{}.csv``."""
    return next(n for n in itertools.count(1) if not any((folder / form.format(n)).exists() for form in forms))


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The records in a file, one at a time; a line that a killed run left half-written is skipped."""
    for line in _lines(file):
        if (record := _parse(line)) is not None:
            yield record


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file; none if there is no such file."""
    if file.is_file():
        with file.open("rb") as lines:
            yield from lines


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode(errors="replace"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def gather_records(files: Sequence[Path], keep: Container[int] | None = None, target: Path | None = None) -> IndexSet:
    """Merge the records of several files into one, sorted by index; of an index's records the last one stays.

    Only the positions of lines are in memory: a run may have any number of images.

    Args:
        files: in the order in which they were written; those that do not exist are left out.
        keep: indices of the records to keep; all if None.
        target: where to write them; the first file if None.

    Returns:
        The indices of the records.
    """
    import numpy as np  # not before it is needed: commands that end in a sentence start without it

    found = array("q")  # index, number of the file and position of each record
    for number, file in enumerate(files):
        start = 0
        for line in _lines(file):
            index: Any = (_parse(line) or {}).get("index")
            if is_int(index) and index >= 0 and (keep is None or index in keep):
                found.extend((index, number, start))
            start += len(line)
    table = np.frombuffer(found, dtype=np.int64).reshape(-1, 3)
    table = table[np.argsort(table[:, 0], kind="stable")]
    last = np.append(table[1:, 0] != table[:-1, 0], len(table) > 0)[: len(table)]
    opened: dict[int, BinaryIO] = {}
    with atomic_write(target or files[0]) as aside, aside.open("wb") as merged, ExitStack() as stack:
        for _, number, start in table[last].tolist():
            if number not in opened:
                if len(opened) == OPEN_FILES:
                    stack.close()
                    opened.clear()
                opened[number] = stack.enter_context(files[number].open("rb"))
            opened[number].seek(start)
            merged.write(opened[number].readline().rstrip(b"\n") + b"\n")
    return IndexSet(table[last, 0].tolist())


def record_files(folder: Path) -> list[Path]:
    """``predictions.jsonl``, and those of the other processes of a run that was killed."""
    return [folder / RECORDS, *sorted(folder.glob("predictions.*.jsonl"))]


def keep_records(folder: Path, done: Container[int]) -> IndexSet:
    """Leave the records of some images in ``predictions.jsonl``, and none elsewhere.

    Returns:
        The indices of the images that have a record.
    """
    files = record_files(folder)
    recorded = gather_records(files, done)
    for file in files[1:]:
        file.unlink(missing_ok=True)
    return recorded


def append_record(file: Path, record: Mapping[str, Any]) -> None:
    """Append a record as one line: all of it or, on a full disk, nothing.

    Raises:
        OSError: if it cannot be written.
    """
    line = to_line(record).encode()
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def to_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON, in which Unicode's line separators are escaped."""
    line = json.dumps(record, ensure_ascii=False)
    for end in "\u0085\u2028\u2029":
        line = line.replace(end, f"\\u{ord(end):04x}")
    return line + "\n"
