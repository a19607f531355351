"""What the jobs of a sweep have in common: one table of their timings, one sheet of their pictures side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdmodule.pictures import captioned_sheet

ROWS_SHOWN = 8
"""Pictures of each job on the sheet."""


def add_job(folder: Path, number: int, overrides: Sequence[str]) -> None:
    """Add a finished predict job to the ``timings.json`` and the ``grid.png`` of its sweep.

    In ``timings.json`` a job is a row of ``rows``: its overrides and what its own ``timings.json`` holds. In
    ``grid.png`` a job is a column, and a row is the same picture in every job. Nothing is added if the job wrote no
    timings or pictures, for want of the callbacks that do.

    Args:
        folder: of the job; those of the sweep are beside it, and the sweep's own is its parent.
        number: of the job, from 0; the first begins the table anew.
        overrides: the job's overrides, such as ``tome.ratio=0.5``.
    """
    if not all((folder / name).is_file() for name in ("timings.json", "predictions.jsonl")):
        return
    table = folder.parent / "timings.json"
    rows: list[dict[str, Any]] = []
    if number and table.is_file():
        rows = [row for row in json.loads(table.read_text())["rows"] if row["job"] < number]
    timings = json.loads((folder / "timings.json").read_text())
    rows.append({"job": number, "overrides": list(overrides), **timings})
    table.write_text(json.dumps({"rows": rows}, indent=2) + "\n")

    common = set.intersection(*(set(row["overrides"]) for row in rows))
    columns = [(_records(folder.parent / str(row["job"])), row) for row in rows]
    images, captions = [], []
    for k in range(min([ROWS_SHOWN, *(len(records) for records, _ in columns)])):
        for records, row in columns:
            own = " ".join(o for o in row["overrides"] if o not in common)
            images.append(Image.open(folder.parent / str(row["job"]) / records[k]["file"]))
            captions.append(f"{own} · {records[k]['prompt']} · {records[k]['seed']}".removeprefix(" · "))
    captioned_sheet(images, captions, columns=len(columns)).save(folder.parent / "grid.png")


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
