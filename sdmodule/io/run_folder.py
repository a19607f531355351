"""The folder of a run: its layout, its records, and how what an earlier run left there is moved aside."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdmodule.errors import unwritable
from sdmodule.io.atomic import atomic_write, atomic_write_text

IMAGES, INPUTS, RECORDS, TIMINGS = "images", "inputs", "predictions.jsonl", "timings.json"
EVALUATION = "evaluation.json"
CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.csv", "samples"
PAGE, REPORT = "index.html", "report.json"
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
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            if (record := _parse(line)) is not None:
                yield record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode(errors="replace"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def gather_records(files: Sequence[Path]) -> None:
    """Merge the records of several files into the first, sorted by index; of an index's records the last one stays.

    Only the positions of lines are in memory: a run may have any number of images.
    """
    positions: dict[int, tuple[Path, int]] = {}
    for file in filter(Path.is_file, files):
        start = 0
        with file.open("rb") as lines:
            for line in lines:
                if (record := _parse(line)) is not None:
                    positions[record["index"]] = file, start
                start += len(line)
    with ExitStack() as stack:
        aside = stack.enter_context(atomic_write(files[0]))
        merged = stack.enter_context(aside.open("wb"))
        opened = {file: stack.enter_context(file.open("rb")) for file in {file for file, _ in positions.values()}}
        for index in sorted(positions):
            file, start = positions[index]
            opened[file].seek(start)
            merged.write(opened[file].readline().rstrip(b"\n") + b"\n")


def to_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON, in which Unicode's line separators are escaped."""
    line = json.dumps(record, ensure_ascii=False)
    for end in "\u0085\u2028\u2029":
        line = line.replace(end, f"\\u{ord(end):04x}")
    return line + "\n"


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records, sorted by index."""
    atomic_write_text(file, "".join(to_line(record) for record in sorted(records, key=lambda record: record["index"])))
