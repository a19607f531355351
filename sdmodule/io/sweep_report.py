"""The report of a sweep: its jobs side by side as a table, a contact sheet, a plot and a page."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdmodule.io.atomic import atomic_write, atomic_write_text
from sdmodule.io.html_report import Job, write_page
from sdmodule.io.images import wrap_text
from sdmodule.io.png_metadata import save_png
from sdmodule.io.redact import redact

SHEET_ROWS = 24
"""Rows of the contact sheet; a larger sweep shows the first ones."""

PLOT = "seconds.svg"


def summarize(folder: Path, finished: Sequence[tuple[Path, Sequence[str]]]) -> None:
    """Write ``summary.csv``, ``sheet.png``, ``seconds.svg`` and ``index.html`` for the jobs of a sweep.

    The plot needs matplotlib; without it one line says how to install it.

    Args:
        folder: folder of the sweep.
        finished: folder and overrides of each job.
    """
    jobs = sweep_jobs(folder, finished)
    atomic_write_text(folder / "summary.csv", table(jobs))
    if any(True for job in jobs for _ in job.records):
        save_png(sheet(folder, jobs), folder / "sheet.png", {})
    if plottable := find_spec("matplotlib") is not None:
        plot(jobs, folder / PLOT)
    else:
        print(f"{PLOT} was not drawn: matplotlib is missing; pip install 'sdmodule[plots]'", flush=True)
    write_page(folder, folder.absolute().name, jobs, PLOT if plottable else None)


def sweep_jobs(folder: Path, finished: Sequence[tuple[Path, Sequence[str]]]) -> list[Job]:
    """The jobs of a sweep, named by the settings that differ between them.

    Args:
        folder: folder of the sweep.
        finished: folder and overrides of each job.
    """
    given = [dict(override.split("=", 1) for override in overrides if "=" in override) for _, overrides in finished]
    keys = dict.fromkeys(key for overrides in given for key in overrides)
    swept = [key for key in keys if len({overrides.get(key) for overrides in given}) > 1]
    jobs = []
    for (root, _), overrides in zip(finished, given, strict=True):
        values = {key: str(redact(overrides.get(key, ""), key)).strip("'\"") for key in swept}
        name = ", ".join(f"{key}={value}" for key, value in values.items()) or root.name
        jobs.append(Job(root, name, root.relative_to(folder).as_posix(), values))
    return jobs


def table(jobs: Sequence[Job]) -> str:
    """One row of CSV per job: its folder, the swept values and its timings."""
    rows = []
    for job in jobs:
        timings = job.timings
        row = {"job": job.folder, **job.swept, "images": sum(1 for _ in job.records)}
        row |= {"seconds_per_image": seconds_per_image(job), "images_per_second": timings.get("images_per_second")}
        row |= {f"seconds_{stage}": value for stage, value in timings.get("seconds", {}).items()}
        row |= {f"step_seconds_{name}": value for name, value in timings.get("step_seconds", {}).items()}
        rows.append(row | {"peak_memory_bytes": timings.get("peak_memory_bytes")})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def seconds_per_image(job: Job) -> float | None:
    """Seconds per image for text, denoising and decoding, without the warm-up; None if it was not timed."""
    rate = job.timings.get("images_per_second")
    return 1 / rate if rate else None


def sheet(folder: Path, jobs: Sequence[Job], tile: int = 160, margin: int = 180) -> Image.Image:
    """A contact sheet with one column per job and one row per prompt and seed."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for job in jobs:
        for record in job.records:
            row = record["prompt"], record["seed"]
            if row in rows or len(rows) < SHEET_ROWS:
                rows.setdefault(row, {})[job.folder] = record["file"]
    font, line, head = ImageFont.load_default(12), 15, 64
    page = Image.new("RGB", (margin + len(jobs) * (tile + 8), head + len(rows) * (tile + 8)), "white")
    draw = ImageDraw.Draw(page)
    for column, job in enumerate(jobs):
        lines = wrap_text(job.name, font, tile)
        draw.multiline_text((margin + column * (tile + 8), 4), "\n".join(lines), fill="black", font=font, spacing=0)
    for number, ((prompt, seed), files) in enumerate(rows.items()):
        y = head + number * (tile + 8)
        lines = [*wrap_text(prompt, font, margin - 16, max_lines=(tile - line) // line), f"seed {seed}"]
        draw.multiline_text((8, y), "\n".join(lines), fill="black", font=font, spacing=0)
        for column, job in enumerate(jobs):
            if job.folder in files:
                with Image.open(folder / job.folder / files[job.folder]) as image:
                    scale = tile / max(image.size)
                    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
                    small = image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else None)
                page.paste(small, (margin + column * (tile + 8), y))
    return page


def plot(jobs: Sequence[Job], file: Path) -> None:
    """Plot seconds per image against the swept value as SVG: a line over numbers, else separate points."""
    from matplotlib import style
    from matplotlib.figure import Figure

    timed = [(job, seconds) for job in jobs if (seconds := seconds_per_image(job)) is not None]
    key = next(iter(jobs[0].swept)) if len(jobs[0].swept) == 1 else ""
    values = [_number(job.swept.get(key, "")) for job, _ in timed]
    numbers = [value for value in values if value is not None]
    numeric = len(numbers) == len(timed) and len(set(numbers)) > 1
    points = sorted(
        (value if numeric and value is not None else float(k), seconds, job.swept[key] if key else job.name)
        for k, (value, (job, seconds)) in enumerate(zip(values, timed, strict=True))
    )
    # text stays text, "$" in it is no formula, and the same data give the same file
    options = {"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "sdmodule"}
    with style.context(["default", options]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's font may have what matplotlib's lacks
        figure = Figure((640 / 96, 350 / 96), layout="constrained")  # inches, of 96 pixels in a browser
        axes = figure.add_subplot()
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-" if numeric else "o")
        for x, y, _ in points:
            axes.annotate(f"{y:.3g} s", (x, y), xytext=(0, 6), textcoords="offset points", ha="center")
        axes.set_xticks(
            [x for x, _, _ in points], [label if len(label) < 24 else label[:23] + "…" for *_, label in points]
        )
        axes.set_ylim(0, 1.15 * max((y for _, y, _ in points), default=1.0))
        axes.margins(x=0.1)
        axes.set_xlabel(key)
        axes.set_ylabel("seconds per image")
        axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(file) as aside:
            figure.savefig(aside, format="svg", metadata={"Date": None})


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
