"""The curves of a training from ``metrics.csv``, with those of the parts before it was resumed."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from sdmodule.io.run_folder import CONFIG, METRICS, TRAINED

Points = list[tuple[int, float | None]]
"""Optimizer steps done, ascending, and the value after each; None if it was NaN or infinite."""


def metrics_files(folder: Path) -> list[Path]:
    """``metrics.csv`` of a training and of the parts before it was resumed, the earliest first.

    A part is renamed to ``metrics-N.csv`` alone; of a training that was set aside, everything has a number.
    """
    aside = 0
    for name in (*TRAINED, CONFIG):
        if name != METRICS:
            aside = max([aside, *(number for number, _ in _numbered(folder, name))])
    parts = [file for number, file in sorted(_numbered(folder, METRICS)) if number > aside]
    return [file for file in (*parts, folder / METRICS) if file.is_file()]


def _numbered(folder: Path, name: str) -> list[tuple[int, Path]]:
    """Files that were renamed to a number, such as ``metrics-2.csv``."""
    stem, suffix = re.escape(Path(name).stem), re.escape(Path(name).suffix)
    matches = [
        (re.fullmatch(rf"{stem}-(\d+){suffix}", path.name), path) for path in folder.glob(f"{Path(name).stem}-*")
    ]
    return [(int(match[1]), path) for match, path in matches if match]


def read_curves(folder: Path) -> dict[str, Points]:
    """The curves of a training by key, such as ``val/loss``.

    What a part logged of a curve beyond the step where the next one goes on with it is left out.
    """
    curves: dict[str, dict[int, float | None]] = {}
    for file in metrics_files(folder):
        for key, points in _read(file).items():
            earlier = {step: value for step, value in curves.get(key, {}).items() if step < min(points)}
            curves[key] = earlier | points
    return {key: sorted(points.items()) for key, points in curves.items()}


def _read(file: Path) -> dict[str, dict[int, float | None]]:
    """The curves of one file; a line that a killed run left half-written is skipped.

    Lightning numbers what a module logs from 0, so that 1 is added; what a callback logs counts the steps done, and has
    no epoch. A validation before the first step is numbered 0 too.
    """
    curves: dict[str, dict[int, float | None]] = {}
    trained = False
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            trained = trained or any(value and key.startswith("train/") for key, value in row.items() if key)
            try:
                step = int(row["step"])
                values = {key: float(value) for key, value in row.items() if value and key not in ("step", "epoch")}
            except (KeyError, TypeError, ValueError):
                continue
            step += bool(row.get("epoch")) and (trained or step > 0)
            for key, value in values.items():
                curves.setdefault(key, {})[step] = value if math.isfinite(value) else None
    return curves


def thinned(points: Points, most: int) -> Points:
    """At most ``most`` points: the means of neighbours, each at the last of their steps."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    thin: Points = []
    for start in range(0, len(points), size):
        near = points[start : start + size]
        values = [value for _, value in near if value is not None]
        thin.append((near[-1][0], sum(values) / len(values) if len(values) == len(near) else None))
    return thin
