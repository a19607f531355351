"""Sample many prompts as parts, some of them killed and resumed, merge them, and compare with one process.

Every image must be there once, with the same pixels and the same metadata as from one process. Killed parts are killed
twice, at random moments, with SIGKILL; a part that is not resumed yet must keep the merge from writing anything.

Example::

    python benchmarks/prediction_parts.py --prompts 10000 --json prediction_parts.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks.forked import Command, output_of
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from sdmodule.cli.merge import merge
from sdmodule.errors import SettingsError
from sdmodule.io.run_folder import IMAGES, RECORDS, read_records

NOT_COMPARED = ("seconds",)
"""Metadata that no two runs share."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    parser = Parser("Sample in parts, kill some, resume, merge, and compare.", quick="80 prompts, each kill at once")
    parser.add_argument("--prompts", type=int, default=10000, help="number of prompts")
    parser.add_argument("--parts", type=int, default=4, help="number of parts")
    parser.add_argument("--killed", type=int, default=2, help="number of parts that are killed")
    parser.add_argument("--batch-size", type=int, default=10, help="images per call of the UNet")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps")
    parser.add_argument("--pretrained", default="tiny", help="what to sample with")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.prompts, settings.batch_size = 80, 2
    check_counts(settings, "prompts", "parts", "killed", "batch_size", "steps")
    if settings.killed > settings.parts:
        raise SettingsError(f"--killed {settings.killed}: must be at most --parts {settings.parts}.")
    return settings


def sample_killed(command: Sequence[str], folder: Path, log: Path, after: Sequence[float]) -> int:
    """Sample a part that is killed while it samples, and not resumed after the last time.

    Args:
        command: its settings.
        folder: the part's.
        log: file of the output.
        after: for each kill, the seconds from the first new image to it.

    Returns:
        The number of images that are there.
    """
    for seconds in after:
        before = count_images(folder)
        one = Command("predict", *command, "resume=true", log=log)
        if not one.kill(lambda before=before: count_images(folder) > before, seconds):
            break
    return count_images(folder)


def count_images(folder: Path) -> int:
    """Number of images of a run."""
    return sum(1 for _ in (folder / IMAGES).glob("*.png"))


def differences(ours: Path, theirs: Path) -> dict[str, int]:
    """How many images are missing, are too many, or differ in pixels or metadata."""
    names = [{file.name for file in (folder / IMAGES).iterdir()} for folder in (ours, theirs)]
    found = {"missing": len(names[1] - names[0]), "too_many": len(names[0] - names[1])}
    pixels = metadata = 0
    for one, other in zip(read_records(ours / RECORDS), read_records(theirs / RECORDS), strict=True):
        metadata += any(one[key] != other[key] for key in one.keys() | other.keys() if key not in NOT_COMPARED)
        with Image.open(ours / one["file"]) as first, Image.open(theirs / other["file"]) as second:
            pixels += first.tobytes() != second.tobytes()
    return found | {"pixels_differ": pixels, "metadata_differ": metadata}


def run_parts(settings: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Sample, kill, resume, merge, compare."""
    prompts, log, rng = work / "prompts.txt", work / "log", random.Random(0)
    prompts.write_text("".join(f"a red circle, number {k}\n" for k in range(settings.prompts)))
    command = [f"prompts={prompts}", f"steps={settings.steps}", f"batch_size={settings.batch_size}", "progress=false"]
    command.append(f"pretrained={settings.pretrained}")
    row: dict[str, Any] = {"prompts": settings.prompts, "parts": settings.parts, "killed": settings.killed}
    start = time.perf_counter()
    row |= {"one_process_seconds": took(start, Command("predict", *command, f"output_dir={work / 'one'}", log=log))}
    out, at_kill = work / "parts", []
    parts = [out / f"part-{k:0{len(str(settings.parts))}}-of-{settings.parts}" for k in range(1, settings.parts + 1)]
    start = time.perf_counter()
    for number, part in enumerate(parts, 1):
        own = [*command, f"output_dir={out}", f"shard={number}/{settings.parts}"]
        if number <= settings.killed:
            kills = [0.0] if settings.quick else [10 * rng.random(), 10 * rng.random()]
            at_kill.append(sample_killed(own, part, log, kills))
        else:
            took(start, Command("predict", *own, log=log))
    refused = merge_error(parts, work / "too-early")
    for number in range(1, settings.killed + 1):
        own = [*command, f"output_dir={out}", f"shard={number}/{settings.parts}", "resume=true"]
        started = time.perf_counter()
        took(started, Command("predict", *own, log=log))
    row |= {"parts_seconds": round(time.perf_counter() - start, 1), "images_at_kill": ", ".join(map(str, at_kill))}
    start = time.perf_counter()
    output_of(partial(merge, [*map(str, parts), f"output_dir={out}"]), log)
    row |= {"merge_seconds": round(time.perf_counter() - start, 1), "refused_before": refused}
    return row | {"images": count_images(out), **differences(out, work / "one")}


def took(start: float, command: Command) -> float:
    """Seconds until a command ends, however long it takes.

    Raises:
        SettingsError: if it fails.
    """
    status, output = command.wait(timeout=3600)
    if status:
        raise SettingsError(f"predict: ended with status {status}: {output[-300:]}")
    return round(time.perf_counter() - start, 1)


def merge_error(parts: Sequence[Path], output: Path) -> bool:
    """Whether parts are refused, with nothing written."""
    try:
        merge([*map(str, parts), f"output_dir={output}"])
    except SettingsError as error:
        return "lacks" in str(error) and not output.exists()
    return False


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """Run, print, write.

    Raises:
        SettingsError: an argument cannot be used, or the merged run is not that of one process.
    """
    settings = parse(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        row = run_parts(settings, Path(work))
    result = report([__file__, *arguments], [row])
    if settings.json:
        write_json(settings.json, result)
    print_table([row])
    wrong = {name: row[name] for name in ("missing", "too_many", "pixels_differ", "metadata_differ") if row[name]}
    if wrong or row["images"] != settings.prompts or not row["refused_before"]:
        raise SettingsError(f"the merged run is not that of one process: {json.dumps(row)}")
    return result


if __name__ == "__main__":
    main(measure)
