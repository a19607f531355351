"""``index.html`` of a training, or of several side by side: one file, which opens from disk without a network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.metrics_file import read_curves, thinned
from sdmodule.io.run_folder import CONFIG, METRICS, REPORT, SAMPLES, TIMINGS

MOST_POINTS = 1000
"""Points of a curve on the page."""

QUALITY = 85
"""Of the images on the page, as WebP."""

CHOSEN = (
    "pretrained",
    "data.root",
    "data.batch_size",
    "resolution",
    "tuning.kind",
    "tuning.rank",
    "objective.prediction_type",
    "objective.weighting",
    "model.optimizer._target_",
    "model.optimizer.lr",
    "model.lr_scheduler._target_",
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "trainer.precision",
    "callbacks.ema.decay",
    "seed",
)
"""Settings that the page of one training shows first."""


def write_training_page(file: Path, title: str, runs: Mapping[str, Path]) -> None:
    """Write the page of trainings, atomically.

    What it shows is untrusted text: the page holds it as JSON, in which ``<`` is escaped so that it cannot end it.

    Args:
        file: the page.
        title: its title.
        runs: folder of each training, by its name on the page.
    """
    template = (resources.files("sdmodule.io") / "training_report.html").read_text(encoding="utf-8")
    data = {"title": title, "runs": [read_training(folder, name) for name, folder in runs.items()]}
    shown = json.dumps(data, allow_nan=False)  # in ASCII: paths may hold what no UTF-8 can
    shown = shown.replace("<", "\\u003c")
    atomic_write_text(file, template.replace("@DATA@", shown))


def is_training(folder: Path) -> bool:
    """Whether a folder holds what a training leaves, as far as a page can show it."""
    return (folder / METRICS).is_file() or any((folder / SAMPLES).glob("*.png")) or (folder / REPORT).is_file()


def read_training(folder: Path, name: str) -> dict[str, Any]:
    """What the page shows of one training."""
    report = read_report(folder)
    curves = read_curves(folder)
    notes = []
    if not curves:
        notes.append("There is no metrics.csv, and so no curves; add csv to the loggers: logger=[csv,…].")
    if any(len(points) > MOST_POINTS for points in curves.values()):
        notes.append(f"Of curves with more than {MOST_POINTS:,} points, means of neighbours are drawn.")
    settings = dict(_flat(_read_yaml(folder / CONFIG)))
    return {
        "name": name,
        "state": report.get("state", ""),
        "warnings": report.get("warnings", []),
        "curves": {key: thinned(points, MOST_POINTS) for key, points in curves.items()},
        "sheets": [[step, _embedded(file, file.stat().st_mtime_ns)] for step, file in sheets(folder)],
        "figures": {**report.get("hardware", {}), **report.get("figures", {}), **_timings(folder)},
        "settings": settings,
        "chosen": {key: settings[key] for key in CHOSEN if key in settings},
        "notes": notes,
    }


def read_report(folder: Path) -> dict[str, Any]:
    """The content of ``report.json``: state, warnings, hardware; empty if there is none."""
    file = folder / REPORT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def sheets(folder: Path) -> list[tuple[int, Path]]:
    """Steps of the validation images, ascending, and their files."""
    return sorted((int(file.stem), file) for file in (folder / SAMPLES).glob("*.png") if file.stem.isdecimal())


@lru_cache(maxsize=1024)
def _embedded(file: Path, changed: int) -> str:
    """An image as the address of its own data; encoded once in a process, unless it has changed."""
    data = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(data, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _read_yaml(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values of a nested configuration; a value that refers to another is left out."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif key and not str(value).startswith("${given:"):
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _timings(folder: Path) -> dict[str, str]:
    """Figures of ``timings.json``, which a training writes when it ends."""
    file = folder / TIMINGS
    timings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "samples_per_second" not in timings:
        return {}
    shown = {
        "images per second": f"{timings['samples_per_second']:.4g}",
        "seconds per step, median": f"{timings['step_seconds']['median']:.4g}",
        "time spent waiting for data": f"{timings['data_wait']:.1%}",
        "peak memory": f"{timings['peak_memory_gib']:.3g} GiB",
    }
    return shown | ({"model FLOPs utilization": f"{timings['mfu']:.1%}"} if "mfu" in timings else {})


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    resolved = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-length:]) for parts in resolved]
        if len(set(names)) == len(names):
            break
    return names
