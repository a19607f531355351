"""``grid.png``: the first images of a run, each above its prompt and seed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from PIL import Image

from sdmodule.io.images import captioned_sheet
from sdmodule.io.png_metadata import save_png
from sdmodule.io.run_folder import GRID, RECORDS, read_records

SHEET_LIMIT = 64
"""Largest number of images on the contact sheet: the first ones of a larger run."""


def write_grid(folder: Path) -> None:
    """Write ``grid.png`` from the images and records of a run; a run without images gets none."""
    records = list(islice(read_records(folder / RECORDS), SHEET_LIMIT))
    images = [Image.open(folder / record["file"]) for record in records]
    captions = [f"{record['prompt']} · seed {record['seed']}" for record in records]
    if images:
        save_png(captioned_sheet(images, captions), folder / GRID, {})
