"""The benchmark pages: a table for each file of ``benchmarks/results/``, with its command, machine, day, versions."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _ext.pages import table, toctree, write_pages

PAGES = {
    "sampling": (
        "Sampling speed",
        "Every variant samples the same prompt from the same seed, in turn; figures are medians. *Step over best* "
        "compares with the best recipe that the documentation of diffusers gives, *image over diffusers* with a whole "
        "image of 50 DDIM steps by plain diffusers. *Psnr db* is the distance from the image of `speed=exact`.",
    ),
    "training": (
        "Training speed",
        "Beside the loop of diffusers' training scripts, on the same images, in the same process, in turn. `tiny` runs "
        "in the process of the larger model, so its peak memory says nothing of it.",
    ),
    "token_merging": (
        "Token merging",
        "*Speed up* compares with no merging, *over tomesd* with the authors' package in the same mode, and "
        "*over tomesd eager* with that package as it is released. *Error* is the relative L2 error of the UNet's "
        "output on random weights: it compares engines and says little about images.",
    ),
    "prompt_following": (
        "Prompt following",
        "How often the embedded model follows its prompt: the share of 400 images (200 for inpainting) in which image "
        "analysis finds what the prompt says. It is strict: a shape has to overlap the rendered one by at least 85%, "
        "without rounded points or a circle's corners; a colour has to be one of the palette; and *clean* is an image "
        "without specks. *All* is the share with everything right. The analysis is itself checked first, on renderings "
        "that are right, on those through the model's autoencoder, about the most that samples can reach, and on "
        "renderings that are wrong in one thing.",
    ),
    "thing_following": (
        "Things",
        "How often an image shows what its caption says, as `tiny-clip` reads it: the name among those of all sprites, "
        "style and background; of two things both must be right.",
    ),
    "gpu": (
        "On a GPU",
        "What `make gpu` has checked and measured on a card: first what must be right, then sampling and training "
        "beside diffusers. *Psnr db* is the distance from the images of plain diffusers.",
    ),
    "growth": ("Growth, overhead and endurance", "What a run costs beyond one image."),
    "other": ("Other results", "Results that no other page describes yet."),
}
"""Title and introduction of each page."""

CHECKS = {
    "reader": "The analysis, on rendered scenes",
    "reconstructed": "The analysis, on rendered scenes through the model's autoencoder",
    "wrong": "The analysis, on renderings that are wrong in one thing",
}
"""Further rows of a result, which are shown if it has them and ``benchmarks.toml`` asks for them, and their titles."""

NO_GPU = " No GPU has been measured yet."

LEFT_OUT = ("label", "met", "at_least", "at_most", "around_seconds_first")
"""Columns that serve the benchmark and not the reader."""


def benchmark_pages(results: Path, notes: Mapping[str, Mapping[str, Any]], version: str) -> dict[str, str]:
    """The pages, by file name.

    Args:
        results: folder of the JSON files.
        notes: what ``benchmarks.toml`` says of each, by the file's name without its ending.
        version: of this package; results of an older minor version are stale.
    """
    sections: dict[str, list[str]] = {name: [] for name in PAGES}
    files = {path.stem: path for path in sorted(results.glob("*.json"))}
    for name in [*(name for name in notes if name in files), *(name for name in files if name not in notes)]:
        content, note = json.loads(files[name].read_text(encoding="utf-8")), notes.get(name, {})
        if isinstance(content, dict) and "rows" in content:
            page = note.get("page", "gpu" if name.startswith("gpu_") else "other")
            sections[page].append(_section(name, content, note, version))
    pages = {}
    for name, parts in sections.items():
        if parts:
            title, introduction = PAGES[name]
            pages[f"{name}.md"] = f"# {title}\n\n{introduction}\n\n" + "\n".join(parts)
    intro = (
        "# Benchmarks\n\n"
        "Every figure in this documentation comes from these pages, and these pages come from `benchmarks/results/`. "
        f"Each table names its command, machine, day and versions.{'' if sections['gpu'] else NO_GPU}\n\n"
        "`python benchmarks/run.py sampling|training|growth|all` measures again, `--quick` in minutes. The scripts "
        "take `--json PATH`.\n\n"
        "A table marked **stale** was measured with an earlier method or an earlier minor version.\n\n"
    )
    names = [name for name in PAGES if f"{name}.md" in pages]
    return {"index.md": intro + toctree(names, maxdepth="2")} | pages


def stale_because(content: Mapping[str, Any], note: Mapping[str, Any], version: str) -> str | None:
    """Why a result no longer holds; None while it does."""
    if "superseded" in note:
        return note["superseded"]
    measured = content.get("versions", {}).get("sdmodule", version)
    if measured.split(".")[:2] != version.split(".")[:2]:
        return f"measured with sdmodule {measured}"
    return None


def _section(name: str, content: Mapping[str, Any], note: Mapping[str, Any], version: str) -> str:
    stale = stale_because(content, note, version)
    title = note.get("title", name.replace("_", " ").capitalize())
    parts = [f"(benchmark-{name})=\n## {title}" + (" (stale)" if stale else "")]
    if stale:
        parts.append(f":::{{warning}}\nStale: {stale}.\n:::")
    parts.append(_origin(name, content, note))
    parts += [table(rows) for rows in _tables(content["rows"])]
    for key, heading in CHECKS.items() if note.get("checks") else ():
        if key in content:
            parts += [f"{heading}:", *(table(rows) for rows in _tables(content[key]))]
    if plot := note.get("plot"):
        parts.append(f"![{title}](../../../benchmarks/results/{plot})")
    return "\n\n".join(parts) + "\n"


def _origin(name: str, content: Mapping[str, Any], note: Mapping[str, Any]) -> str:
    """Where figures come from: command, machine, day, protocol and versions."""
    hardware = content.get("hardware", {})
    about = {
        "command": f"`{content['command']}`",
        "machine": note.get("machine") or f"{hardware.get('cores')} cores of {hardware.get('cpu')}",
        "hardware": ", ".join(
            str(value)
            for value in (hardware.get("cpu"), f"{hardware.get('memory_gib')} GiB", hardware.get("gpu"))
            if value
        ),
        "date": content.get("date") or note.get("measured", "not recorded"),
        "protocol": content.get("protocol", ""),
        "versions": ", ".join(f"{package} {number}" for package, number in content.get("versions", {}).items()),
        "file": f"`benchmarks/results/{name}.json`",
    }
    return "\n".join(f"- {key}: {value}" for key, value in about.items() if value)


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, str]]]:
    """Rows as tables: those of one section that follow one another with like columns share one."""
    tables: list[list[dict[str, str]]] = []
    heads: set[str] = set()
    section = None
    for row in rows:
        cells = {key.replace("_", " "): cell(value) for key, value in row.items() if key not in LEFT_OUT}
        if not tables or row.get("section") != section or len(heads & cells.keys()) < len(cells) / 2:
            tables.append([])
            heads, section = set(), row.get("section")
        heads |= cells.keys()
        tables[-1].append(cells)
    return tables


def cell(value: Any) -> str:
    """A value as a table shows it; a share of right answers as a percentage."""
    if isinstance(value, Mapping) and "rate" in value:
        return f"{value['rate']:.1%} of {value['counted']}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def generate(root: Path, target: Path, version: str) -> None:
    """Write the benchmark pages of a checkout into the folder ``target``."""
    notes = tomllib.loads((root / "docs" / "benchmarks.toml").read_text(encoding="utf-8"))
    write_pages(target, benchmark_pages(root / "benchmarks" / "results", notes, version))


def readme_table(results: Path) -> str:
    """The one table of the README: sampling beside plain diffusers, from ``sampling_speed.json``."""
    rows = json.loads((results / "sampling_speed.json").read_text(encoding="utf-8"))["rows"]
    return table(
        [
            {
                "variant": f"`{row['variant']}`" if "=" in row["variant"] else row["variant"],
                "precision": row["dtype"],
                "steps": str(row["steps"]),
                "seconds per step": f"{row['step_seconds']:.2f}",
                "seconds per image": f"{row['image_seconds']:.1f}",
                "speed-up per image": f"{row['image_over_diffusers']:.2f}",
            }
            for row in rows
            if row["variant"] not in ("older loop", "diffusers + tomesd")
        ]
    )
