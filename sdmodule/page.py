"""One page to browse a run, or a sweep of runs: ``index.html``, which needs no network and opens from the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sdmodule.atomic import write_whole
from sdmodule.run_folder import RECORDS, TIMINGS, read_records


@dataclass
class Job:
    """One run, as the page shows it.

    Attributes:
        name: what tells it from the others of its sweep.
        folder: where its pictures are, seen from the page; empty if beside it.
        swept: the settings that differ between the jobs of a sweep.
        records: what ``predictions.jsonl`` holds.
        timings: what ``timings.json`` holds.
    """

    name: str
    folder: str
    swept: dict[str, str] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)


def read_job(folder: Path, name: str = "", place: str = "", swept: Mapping[str, str] | None = None) -> Job:
    """What a finished run has left in its folder."""
    timings = folder / TIMINGS
    return Job(
        name,
        place,
        dict(swept or {}),
        read_records(folder / RECORDS),
        json.loads(timings.read_text(encoding="utf-8")) if timings.is_file() else {},
    )


def write_page(folder: Path, title: str, jobs: Sequence[Job], plot: str | None = None) -> None:
    """Write ``index.html``.

    Prompts are anybody's text: they stand in the page as data alone, with nothing in them that ends the data.

    Args:
        folder: where.
        title: of the page.
        jobs: the runs to show.
        plot: a picture of the seconds, in the same folder.
    """
    data = json.dumps({"title": title, "jobs": [asdict(job) for job in jobs], "plot": plot}, ensure_ascii=False)
    template = (resources.files("sdmodule.assets") / "index.html").read_text(encoding="utf-8")
    write_whole(folder / "index.html", template.replace("@DATA@", data.replace("<", "\\u003c")))
