"""Join the parts of a predict run into one run folder, equal to that of one process."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdmodule.errors import SettingsError, count_of
from sdmodule.io.atomic import atomic_write, atomic_write_text
from sdmodule.io.grid import write_grid
from sdmodule.io.html_report import Job, write_page
from sdmodule.io.index_set import IndexSet
from sdmodule.io.merged_timings import merge_timings
from sdmodule.io.png_scan import PNGScanner
from sdmodule.io.run_folder import (
    CONFIG,
    IMAGES,
    INPUTS,
    RECORDS,
    TIMINGS,
    gather_records,
    read_records,
    record_files,
    set_aside_images,
)
from sdmodule.io.run_part import PART, Part, PartOfRun, digest

STAGE = ".merge"
"""Folder in the output folder in which everything is made; it is then moved to its place by a few renames."""

RUN, COMPLETE = MARKS = ("run", "complete")
"""Files in that folder: which run it is of and, once everything in it is made, that it is."""

NAMED = 8
"""Ranges of missing images that a message names; it counts the others."""


@dataclass(frozen=True)
class GivenPart:
    """A part's folder, and what its ``part.json`` says."""

    folder: Path
    about: PartOfRun

    @property
    def indices(self) -> range:
        """The indices of its images."""
        return range(self.about.first, self.about.first + self.about.images)


def read_parts(folders: Sequence[Path]) -> list[GivenPart]:
    """The parts in some folders, in their order in the run.

    Raises:
        SettingsError: if a folder is none of a part, if they are of different runs, or one is given twice.
    """
    parts = [GivenPart(folder, PartOfRun.read(folder)) for folder in folders]
    first = parts[0]
    for part in parts[1:]:
        if difference := _difference(first.about, part.about):
            raise SettingsError(
                f"{part.folder}: is of another run than {first.folder}, with {difference}; give the parts of one run."
            )
    by_number: dict[int, GivenPart] = {}
    for part in parts:
        other = by_number.setdefault(part.about.part, part)
        if other is not part:
            raise SettingsError(
                f"{part.folder}: is shard={part.about.part}/{part.about.parts}, as {other.folder} is; give one of them."
            )
    return [by_number[number] for number in sorted(by_number)]


def _difference(one: PartOfRun, other: PartOfRun) -> str:
    """The first thing in which two parts differ that those of one run share."""
    for key in dict.fromkeys((*other.settings, *one.settings)):
        if one.settings.get(key) != other.settings.get(key):
            return f"{key}={other.settings.get(key)!r} instead of {one.settings.get(key)!r}"
    if one.parts != other.parts:
        return f"{other.parts} parts instead of {one.parts}"
    if one.total != other.total:
        return f"{count_of(other.total, 'image')} instead of {one.total:,}"
    return "other prompts, seeds or input images" if one.requests != other.requests else ""


def check_complete(parts: Sequence[GivenPart], on_done: Callable[[int], None]) -> None:
    """Check that all images of the run are there, intact and with their records.

    Args:
        parts: of one run.
        on_done: called with a number of images once they are checked.

    Raises:
        SettingsError: if images are missing; the message says which, and of which part.
    """
    there, scanner = IndexSet(), PNGScanner()
    for part in parts:
        for file in record_files(part.folder):
            for record in read_records(file):
                index = record.get("index")
                if index in there or index not in part.indices:
                    continue
                if _is_intact(part.folder, record.get("file"), scanner):
                    there.add(int(record["index"]))
                    on_done(1)
    run = parts[0].about
    missing = []
    for number in range(1, run.parts + 1):
        shard = Part(number, run.parts)
        indices = shard.of(range(run.total), run.settings["batch_size"])
        missing += [f"{ends} of shard={shard}" for ends in _ranges(k for k in indices if k not in there)]
    if missing:
        more = f" and {len(missing) - NAMED:,} more ranges" if len(missing) > NAMED else ""
        raise SettingsError(
            f"merge: lacks {run.total - len(there):,} of {count_of(run.total, 'image')}: {', '.join(missing[:NAMED])}"
            f"{more}; sample them with resume=true, and give the folders of all parts."
        )


def _is_intact(folder: Path, name: object, scanner: PNGScanner) -> bool:
    if not isinstance(name, str) or not re.fullmatch(rf"{IMAGES}/\d{{5,}}-\d+\.png", name):
        return False
    try:
        return bool(scanner.metadata(folder / name))
    except (SettingsError, OSError):
        return False


def _ranges(indices: Iterator[int]) -> Iterator[str]:
    """``12 to 19`` for indices that follow on one another, ``7`` for one alone."""
    first = last = None
    for index in indices:
        if last is not None and index == last + 1:
            last = index
            continue
        if first is not None:
            yield str(first) if first == last else f"{first} to {last}"
        first = last = index
    if first is not None:
        yield str(first) if first == last else f"{first} to {last}"


def merge_parts(parts: Sequence[GivenPart], output: Path, config: str) -> bool:
    """Write the run folder of complete parts. If this is interrupted, the next call continues.

    Images are hard links where the file system has them, else copies. All is made in a folder aside, and moved to its
    place at the end; images of another run are moved aside then.

    Args:
        parts: of one run, all of them.
        output: an existing folder.
        config: content of ``config.yaml``.

    Returns:
        False if the folder holds this run already.

    Raises:
        OSError: if it cannot be written.
    """
    stage, run = output / STAGE, _name_of_run(parts[0].about)
    if stage.is_dir() and not ((stage / RUN).is_file() and (stage / RUN).read_text() == run):
        shutil.rmtree(stage)
    if not (stage / COMPLETE).is_file():
        (stage / IMAGES).mkdir(parents=True, exist_ok=True)
        atomic_write_text(stage / RUN, run)
        files = [file for part in parts for file in record_files(part.folder)]
        gather_records(files, keep=range(parts[0].about.total), target=stage / RECORDS)
        if _is_merged(stage / RECORDS, output):
            shutil.rmtree(stage)
            return False
        _fill(stage, parts, config, output.absolute().name)
        set_aside_images(output)
        atomic_write_text(stage / COMPLETE, "")
    for entry in sorted(stage.iterdir()):
        if entry.name not in MARKS:
            _move(entry, output / entry.name)
    shutil.rmtree(stage)
    return True


def _name_of_run(about: PartOfRun) -> str:
    """The same for all parts of a run, and another one for each run."""
    return digest([{"requests": about.requests, "settings": about.settings, "total": about.total}])


def _is_merged(records: Path, output: Path) -> bool:
    """Whether a folder has exactly these records, and their images."""
    if not (output / RECORDS).is_file() or not filecmp.cmp(records, output / RECORDS, shallow=False):
        return False
    return all((output / record["file"]).is_file() for record in read_records(records))


def _fill(stage: Path, parts: Sequence[GivenPart], config: str, title: str) -> None:
    """Make all that a run folder holds."""
    part_of = iter(parts)
    part = next(part_of)
    for record in read_records(stage / RECORDS):
        while record["index"] not in part.indices:
            part = next(part_of)
        _link(part.folder / record["file"], stage / record["file"])
    for part in parts:
        for file in part.folder.glob(f"{INPUTS}/*.png"):
            (stage / INPUTS).mkdir(exist_ok=True)
            _link(file, stage / INPUTS / file.name)
    timed = [part.folder / TIMINGS for part in parts if (part.folder / TIMINGS).is_file()]
    if timed:
        timings = merge_timings([json.loads(file.read_text(encoding="utf-8")) for file in timed])
        atomic_write_text(stage / TIMINGS, json.dumps(timings, indent=2) + "\n")
    atomic_write_text(stage / CONFIG, config)
    write_grid(stage)
    write_page(stage, title, [Job(stage)])


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it to another file system; one that is there already stays if it is equal."""
    if target.exists():
        if target.samefile(source) or filecmp.cmp(source, target, shallow=False):
            return
        target.unlink()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        with atomic_write(target) as aside:
            shutil.copyfile(source, aside)


def _move(source: Path, target: Path) -> None:
    """Move a file over another one, or what is in a folder into another one."""
    if source.is_dir() and target.is_dir():
        for entry in source.iterdir():
            _move(entry, target / entry.name)
        source.rmdir()
    else:
        os.replace(source, target)


def check_output(output: Path) -> None:
    """Check that an output folder is none of a part.

    Raises:
        SettingsError: if it is one.
    """
    if (output / PART).is_file():
        raise SettingsError(f"output_dir={output}: is itself a part; choose another folder.")
