"""The report of a sweep of trainings: their last metrics as a table, and their last samples side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.html_report import Job, write_page
from sdmodule.io.metrics_file import read_curves
from sdmodule.io.sweep_report import sweep_jobs


class Training(Job):
    """One training on the page, with the sheet of its last samples in the place of its images."""

    @property
    @override
    def records(self) -> Iterator[dict[str, Any]]:
        sheets = sorted(self.root.glob("samples/*.png"))
        for sheet in sheets[-1:]:
            yield {
                "index": 0,
                "prompt": "samples at the end",
                "seed": 0,
                "file": f"samples/{sheet.name}",
                **self.metrics,
            }

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric in ``metrics.csv``; those that are NaN or infinite are left out."""
        last = {key: points[-1][1] for key, points in read_curves(self.root).items()}
        return {key: value for key, value in last.items() if value is not None}


def summarize_trainings(folder: Path, finished: Sequence[tuple[Path, Sequence[str]]]) -> None:
    """Write ``summary.csv`` and ``index.html`` for the trainings of a sweep.

    Args:
        folder: folder of the sweep.
        finished: folder and overrides of each training.
    """
    trainings = [Training(job.root, job.name, job.folder, job.swept) for job in sweep_jobs(folder, finished)]
    rows = [{"job": one.folder, **one.swept, **one.metrics} for one in trainings]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(folder / "summary.csv", text.getvalue())
    write_page(folder, folder.absolute().name, trainings)
