"""``index.html``: a page to browse the images of a run or a sweep, which opens from disk without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from sdmodule.io.atomic import atomic_write
from sdmodule.io.run_folder import EVALUATION, RECORDS, TIMINGS, read_records


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
    """Write ``index.html``, with no more than one image's metadata in memory.

    Prompts are untrusted text: the page holds them as JSON, in which ``<`` is escaped so that they cannot end it.

    Args:
        folder: where the page is written.
        title: title of the page.
        jobs: the runs to show.
        plot: name of the plot of seconds per image, in the same folder.
    """
    template = (resources.files("sdmodule.io") / "report.html").read_text(encoding="utf-8")
    head, tail = template.split("@DATA@")
    with atomic_write(folder / "index.html") as aside, aside.open("w", encoding="utf-8") as page:
        page.write(head)
        page.writelines(piece.replace("<", "\\u003c") for piece in _pieces(title, jobs, plot))
        page.write(tail)


def _pieces(title: str, jobs: Sequence[Job], plot: str | None) -> Iterator[str]:
    """The data of the page as JSON, one image at a time."""
    yield f'{{"title": {_json(title)}, "plot": {_json(plot)}, "jobs": ['
    for number, job in enumerate(jobs):
        head = {"name": job.name, "folder": job.folder, "swept": job.swept, "timings": job.timings}
        head |= {"evaluation": job.evaluation}
        yield f'{", " if number else ""}{_json(head)[:-1]}, "records": ['
        for index, record in enumerate(job.records):
            yield f"{', ' if index else ''}{_json(record)}"
        yield "]}"
    yield "]}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
