"""``index.html``: a page to browse the images of a run or a sweep, which opens from disk without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from sdmodule.io.atomic import atomic_replace_dir, atomic_write
from sdmodule.io.run_folder import EVALUATION, PAGE, RECORDS, TIMINGS, read_records

PAGES = "pages"
"""The folder beside a page of many images that holds their records."""

IN_ONE_FILE = 1000
"""Largest number of images whose records are in one file; a page of no more is one file as a whole."""


@dataclass
class Job:
    """One run on the page.

    Attributes:
        root: the run folder.
        name: its title among the jobs of a sweep.
        folder: path of the run folder relative to the page; empty if the page is in it.
        swept: the settings that differ between the jobs of a sweep.
    """

    root: Path
    name: str = ""
    folder: str = ""
    swept: Mapping[str, str] = field(default_factory=dict)

    @property
    def records(self) -> Iterator[dict[str, Any]]:
        """The records in ``predictions.jsonl``, one at a time."""
        return read_records(self.root / RECORDS)

    @cached_property
    def timings(self) -> dict[str, Any]:
        """The content of ``timings.json``; empty if there is none."""
        return _read(self.root / TIMINGS)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The content of ``evaluation.json``; empty if there is none."""
        return _read(self.root / EVALUATION)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_page(folder: Path, title: str, jobs: Sequence[Job], plot: str | None = None) -> None:
    """Write ``index.html``; of many images with their records in files of ``pages/``, which the page loads as needed.

    No more than the metadata of one such file are in memory. Prompts are untrusted text: the page holds them as JSON,
    in which ``<`` is escaped so that they cannot end it.

    Args:
        folder: where the page is written.
        title: title of the page.
        jobs: the runs to show.
        plot: name of the plot of seconds per image, in the same folder.
    """
    template, script = (
        (resources.files("sdmodule.io") / name).read_text("utf-8") for name in ("report.html", "report.js")
    )
    head, tail = template.replace("@SCRIPT@", script).split("@DATA@")
    files = _write_files(folder / PAGES, jobs) if sum(map(_lines, jobs)) > IN_ONE_FILE else None
    with atomic_write(folder / PAGE) as aside, aside.open("w", encoding="utf-8") as page:
        page.write(head)
        page.writelines(piece.replace("<", "\\u003c") for piece in _pieces(title, jobs, plot, files))
        page.write(tail)
    if files is None:
        shutil.rmtree(folder / PAGES, ignore_errors=True)


def _lines(job: Job) -> int:
    """Lines of a run's records: as many as it has images, if none was left half-written."""
    if not (job.root / RECORDS).is_file():
        return 0
    with (job.root / RECORDS).open("rb") as lines:
        return sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))


def _pieces(title: str, jobs: Sequence[Job], plot: str | None, files: list[dict[str, int]] | None) -> Iterator[str]:
    """The data of the page as JSON, one image at a time; without images if these are in files of their own."""
    yield f'{{"title": {_json(title)}, "plot": {_json(plot)}, "files": {_json(files)}, "jobs": ['
    for number, job in enumerate(jobs):
        head = {"name": job.name, "folder": job.folder, "swept": job.swept, "timings": job.timings}
        head |= {"evaluation": job.evaluation}
        yield f'{", " if number else ""}{_json(head)[:-1]}, "records": ['
        for index, record in enumerate(job.records if files is None else ()):
            yield f"{', ' if index else ''}{_json(record)}"
        yield "]}"
    yield "]}"


def _write_files(folder: Path, jobs: Sequence[Job]) -> list[dict[str, int]]:
    """Write the records of all jobs, `IN_ONE_FILE` to a file, as scripts: a page on disk may load nothing else.

    Returns:
        For each file the number of its job, the position of its first image among all, and its number of images.
    """
    files: list[dict[str, int]] = []
    with atomic_replace_dir(folder) as aside:
        first = 0
        for number, job in enumerate(jobs):
            records = job.records
            while some := list(islice(records, IN_ONE_FILE)):
                script = f"receive({len(files)}, {_json(_json(_without_repetition(some)))});\n"
                (aside / f"{len(files)}.js").write_text(script, encoding="utf-8")
                files.append({"job": number, "first": first, "images": len(some)})
                first += len(some)
    for left in folder.glob("*.js"):  # of an earlier page of more images
        if left.stem.isdecimal() and int(left.stem) >= len(files):
            left.unlink(missing_ok=True)
    return files


def _without_repetition(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records with what all of them have in common taken out of them."""
    shared = dict(records[0])
    for record in records:
        for key in [key for key, value in shared.items() if record.get(key) != value]:
            del shared[key]
    return {"shared": shared, "own": [{k: v for k, v in record.items() if k not in shared} for record in records]}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
