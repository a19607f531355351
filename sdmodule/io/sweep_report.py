"""What the jobs of a sweep have left, side by side: a table, a sheet, a plot and a page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.html_report import Job, write_page
from sdmodule.io.images import break_lines
from sdmodule.io.png_metadata import save_png
from sdmodule.io.redact import redact

SHEET_ROWS = 24
"""Rows of the sheet; a larger sweep shows its first ones."""


def summarize(folder: Path, finished: Sequence[tuple[Path, Sequence[str]]]) -> None:
    """Write ``summary.csv``, ``sheet.png``, ``seconds.svg`` and ``index.html`` of the jobs of a sweep.

    Args:
        folder: of the sweep.
        finished: each job's folder and the overrides that it was given.
    """
    given = [dict(override.split("=", 1) for override in overrides if "=" in override) for _, overrides in finished]
    keys = dict.fromkeys(key for overrides in given for key in overrides)
    swept = [key for key in keys if len({overrides.get(key) for overrides in given}) > 1]
    jobs = []
    for (place, _), overrides in zip(finished, given, strict=True):
        values = {key: str(redact(overrides.get(key, ""), key)).strip("'\"") for key in swept}
        name = ", ".join(f"{key}={value}" for key, value in values.items()) or place.name
        jobs.append(Job(place, name, place.relative_to(folder).as_posix(), values))
    atomic_write_text(folder / "summary.csv", table(jobs))
    atomic_write_text(folder / "seconds.svg", plot(jobs))
    if any(True for job in jobs for _ in job.records):
        save_png(sheet(folder, jobs), folder / "sheet.png", {})
    write_page(folder, folder.absolute().name, jobs, "seconds.svg")


def table(jobs: Sequence[Job]) -> str:
    """A row a job: its folder, the swept values, its figures."""
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
    """Seconds of text, denoising and decoding for an image, without the warm-up; None if it was not timed."""
    rate = job.timings.get("images_per_second")
    return 1 / rate if rate else None


def sheet(folder: Path, jobs: Sequence[Job], tile: int = 160, margin: int = 180) -> Image.Image:
    """Images in a table: a column a job, a row a prompt and seed."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for job in jobs:
        for record in job.records:
            rows.setdefault((record["prompt"], record["seed"]), {})[job.folder] = record["file"]
    font, line, head = ImageFont.load_default(12), 15, 64
    page = Image.new("RGB", (margin + len(jobs) * (tile + 8), head + min(len(rows), SHEET_ROWS) * (tile + 8)), "white")
    draw = ImageDraw.Draw(page)
    for column, job in enumerate(jobs):
        lines = break_lines(job.name, font, tile)
        draw.multiline_text((margin + column * (tile + 8), 4), "\n".join(lines), fill="black", font=font, spacing=0)
    for number, ((prompt, seed), files) in enumerate(list(rows.items())[:SHEET_ROWS]):
        y = head + number * (tile + 8)
        lines = [*break_lines(prompt, font, margin - 16, most=(tile - line) // line), str(seed)]
        draw.multiline_text((8, y), "\n".join(lines), fill="black", font=font, spacing=0)
        for column, job in enumerate(jobs):
            if job.folder in files:
                with Image.open(folder / job.folder / files[job.folder]) as image:
                    scale = tile / max(image.size)
                    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
                    small = image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else None)
                page.paste(small, (margin + column * (tile + 8), y))
    return page


def plot(jobs: Sequence[Job]) -> str:
    """Seconds for an image against the swept value, as SVG: on a scale for numbers, side by side for anything else."""
    timed = [(job, seconds) for job in jobs if (seconds := seconds_per_image(job)) is not None]
    key = next(iter(jobs[0].swept)) if len(jobs[0].swept) == 1 else ""
    values = [_number(job.swept.get(key, "")) for job, _ in timed]
    numeric = bool(values) and all(value is not None for value in values) and len(set(values)) > 1
    places = [value or 0.0 for value in values] if numeric else [float(k) for k in range(len(timed))]
    low, high = (min(places), max(places)) if places else (0.0, 1.0)
    most = max((seconds for _, seconds in timed), default=1.0) * 1.15
    left, right, top, bottom = 70, 620, 20, 300

    def at(place: float, seconds: float) -> tuple[float, float]:
        return left + 20 + (place - low) / ((high - low) or 1) * (right - left - 40), bottom - seconds / most * (
            bottom - top
        )

    points = sorted(at(place, seconds) for place, (_, seconds) in zip(places, timed, strict=True))
    parts = [f'<path d="M{left} {top}V{bottom}H{right}" class="axis"/>']
    if numeric:
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="line"/>')
    for place, (job, seconds) in zip(places, timed, strict=True):
        x, y = at(place, seconds)
        label = job.swept.get(key, "") if key else job.name
        short = label if len(label) < 24 else label[:23] + "…"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(job.name)}: {seconds:.3g} s</title></circle>'
        )
        parts.append(f'<text x="{x:.1f}" y="{y - 10:.1f}" class="middle">{seconds:.3g} s</text>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" class="middle">{escape(short)}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 40}" class="middle">{escape(key)}</text>')
    parts.append(
        f'<text transform="translate(20 {(top + bottom) / 2}) rotate(-90)" class="middle">seconds an image</text>'
    )
    style = (
        "text{font:13px sans-serif;fill:#333}.middle{text-anchor:middle}circle{fill:#2155c4}"
        ".axis,.line{fill:none;stroke:#888}.line{stroke:#2155c4;stroke-width:2}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}circle{fill:#86aefc}.line{stroke:#86aefc}}"
    )
    body = "\n".join(parts)
    size = 'width="640" height="350" viewBox="0 0 640 350"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>\n{body}\n</svg>\n'


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
