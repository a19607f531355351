"""One page to browse a run, or a sweep of runs: ``index.html``, which needs no network and opens from the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from sdmodule.io.atomic import atomic_write
from sdmodule.io.run_folder import RECORDS, TIMINGS, read_records


@dataclass
class Job:
    """One run, as the page shows it.

    Attributes:
        root: its folder.
        name: what tells it from the others of its sweep.
        folder: where its images are, seen from the page; empty if beside it.
        swept: the settings that differ between the jobs of a sweep.
    """

    root: Path
    name: str = ""
    folder: str = ""
    swept: Mapping[str, str] = field(default_factory=dict)

    @property
    def records(self) -> Iterator[dict[str, Any]]:
        """What ``predictions.jsonl`` holds, an image at a time."""
        return read_records(self.root / RECORDS)

    @cached_property
    def timings(self) -> dict[str, Any]:
        """What ``timings.json`` holds."""
        timings = self.root / TIMINGS
        return json.loads(timings.read_text(encoding="utf-8")) if timings.is_file() else {}


def write_page(folder: Path, title: str, jobs: Sequence[Job], plot: str | None = None) -> None:
    """Write ``index.html``, without more than an image's metadata in memory.

    Prompts are anybody's text: they stand in the page as data alone, with nothing in them that ends the data.

    Args:
        folder: where.
        title: of the page.
        jobs: the runs to show.
        plot: an image of the seconds, in the same folder.
    """
    template = (resources.files("sdmodule.io") / "report.html").read_text(encoding="utf-8")
    head, tail = template.split("@DATA@")
    with atomic_write(folder / "index.html") as aside, aside.open("w", encoding="utf-8") as page:
        page.write(head)
        page.writelines(piece.replace("<", "\\u003c") for piece in _pieces(title, jobs, plot))
        page.write(tail)


def _pieces(title: str, jobs: Sequence[Job], plot: str | None) -> Iterator[str]:
    """The page's data as JSON, an image at a time."""
    yield f'{{"title": {_json(title)}, "plot": {_json(plot)}, "jobs": ['
    for number, job in enumerate(jobs):
        told = {"name": job.name, "folder": job.folder, "swept": job.swept, "timings": job.timings}
        yield f'{", " if number else ""}{_json(told)[:-1]}, "records": ['
        for place, record in enumerate(job.records):
            yield f"{', ' if place else ''}{_json(record)}"
        yield "]}"
    yield "]}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
