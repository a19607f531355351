"""Measure what a predict run costs beside its images: the page, opening it, finding what is done, merging parts.

Runs of some numbers of tiny images are made without a model: real PNGs with the metadata of predict, and their records.
Then each step runs in a process of its own, since peak memory never goes down; memory is what it adds.
The page is opened in a headless Chromium, if there is one, from disk: until its first images are decoded.

Example::

    python benchmarks/growing_pages.py --json growing_pages.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.forked import output_of
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from sdmodule.callbacks.timing_figures import peak_memory
from sdmodule.cli.merge import merge
from sdmodule.cli.resume_predict import FinishedImages
from sdmodule.errors import SettingsError
from sdmodule.io.html_report import Job, write_page
from sdmodule.io.run_folder import IMAGES, RECORDS, TIMINGS, keep_records, to_line
from sdmodule.io.run_part import Part, PartOfRun
from sdmodule.sampling.requests import build_requests
from tests.chromium import PROGRAM, Page

SHARED: dict[str, Any] = {
    "steps": 50,
    "guidance_scale": 7.5,
    "guidance_rescale": 0.0,
    "eta": 0.0,
    "scheduler": "DDIMScheduler",
    "scheduler_settings": {"timestep_spacing": "leading"},
    "height": 64,
    "width": 64,
    "model": "tiny",
    "precision": "32-true",
}
"""Metadata that are compared in a resumed run."""

COMPUTED = {"device": "cpu x86_64", "software": "sdmodule, torch", "seconds": 0.25, "batch_size": 4, "batch_row": 0}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    parser = Parser("Measure what a predict run costs beside its images.", quick="200 and 1,200 images")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000, 100000], help="numbers of images")
    parser.add_argument("--side", type=int, default=64, help="pixels of a side of each image")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.images = [200, 1200]
    check_counts(settings, "images", "side")
    return settings


def make_run(folder: Path, count: int, side: int, first: int = 0) -> None:
    """Write the images and records of a run, or of a part of it, as predict does, but without flushing each to disk."""
    (folder / IMAGES).mkdir(parents=True)
    patterns = [Image.effect_noise((side, side), 20 + k).convert("RGB") for k in range(16)]
    with (folder / RECORDS).open("w", encoding="utf-8") as lines:
        for k in range(first, first + count):
            own = {"index": k, "prompt": f"a red circle, number {k}", "negative_prompt": "", "seed": k}
            metadata, text = own | SHARED | COMPUTED, PngInfo()
            for name, value in metadata.items():
                text.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
            file = f"{IMAGES}/{k:05d}-{k}.png"
            patterns[k % 16].save(folder / file, pnginfo=text, compress_level=1)
            lines.write(to_line({"file": file, **metadata}))
    timings = {"images": count, "seconds": {"text": 1.0, "denoise": 20.0, "decode": 4.0, "save": 1.0}}
    timings |= {"seconds_total": 26.0, "step_seconds": {"median": 0.1, "p95": 0.2}, "images_per_second": count / 25}
    timings |= {"warmup": None, "peak_memory_bytes": 2**29, "device": "cpu", "devices": 1}
    (folder / TIMINGS).write_text(json.dumps(timings))


def split(run: Path, count: int, parts: int, target: Path) -> None:
    """The same run in parts, by hard links."""
    records = (run / RECORDS).read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(1, parts + 1):
        part = Part(number, parts)
        indices = part.of(range(count), 4)
        folder = target / part.folder
        (folder / IMAGES).mkdir(parents=True)
        for k in indices:
            name = f"{IMAGES}/{k:05d}-{k}.png"
            os.link(run / name, folder / name)
        (folder / RECORDS).write_text("".join(records[indices[0] : indices[-1] + 1]), encoding="utf-8")
        shutil.copy(run / TIMINGS, folder / TIMINGS)
        about = PartOfRun(number, parts, indices[0], len(indices), count, "", SHARED | {"batch_size": 4})
        about.write(folder)


def step(what: str, folder: Path, count: int) -> dict[str, Any]:
    """Seconds and MiB of one step in a process of its own."""
    used = json.loads(output_of(partial(measure, what, folder, count), folder.with_name("log")).splitlines()[-1])
    return {f"{what}_seconds": round(used["seconds"], 2), f"{what}_mib": round(used["memory"] / 2**20, 1)}


def measure(what: str, folder: Path, count: int) -> None:
    """Do one step and print what it took; the requests are there before."""
    requests = build_requests([f"a red circle, number {k}" for k in range(count)])
    device = torch.device("cpu")
    before, start = peak_memory(device), time.perf_counter()
    if what == "page":
        write_page(folder, "run", [Job(folder)])
    elif what == "resume":
        found = FinishedImages(folder, requests, SHARED).find()
        assert len(found) == count
    elif what == "records":
        assert len(keep_records(folder, range(count))) == count
    else:
        merge([*map(str, sorted(folder.glob("part-*"))), f"output_dir={folder}"])
    print(json.dumps({"seconds": time.perf_counter() - start, "memory": peak_memory(device) - before}))


def open_page(page: Path, profile: Path, name: str) -> dict[str, Any]:
    """Seconds until a page shows its first images, seconds of its filter, and the memory of the browser's processes."""
    browser = Page(profile)
    try:
        before, start = _memory(browser), time.perf_counter()
        browser.open(page.as_uri())
        browser.run(
            "new Promise((done) => { const look = () => document.querySelector('#images img')?.naturalWidth"
            " ? done() : setTimeout(look, 5); look(); })"
        )
        shown = time.perf_counter() - start
        memory, start = _memory(browser) - before, time.perf_counter()
        browser.run(
            "new Promise((done) => { const filter = document.querySelector('#filter'); filter.value = 'number 77';"
            " filter.dispatchEvent(new Event('input')); const look = () =>"
            " document.querySelector('#images').ariaBusy !== 'true' ? done() : setTimeout(look, 5); look(); })"
        )
        filtered = time.perf_counter() - start
        if browser.messages:
            raise SettingsError(f"the page complains: {browser.messages[0]}")
    finally:
        browser.close()
    figures = {"open_seconds": round(shown, 2), "open_mib": round(memory / 2**20), "filter_seconds": round(filtered, 2)}
    return {f"{name}_{key}": value for key, value in figures.items()}


def _memory(browser: Page) -> int:
    """Bytes of the browser's processes, with what they share counted once for each of those that share it."""
    processes = psutil.Process(browser._process.pid)
    found = 0
    for process in (processes, *processes.children(recursive=True)):
        try:
            found += process.memory_full_info().pss
        except psutil.Error:  # it has ended by now
            continue
    return found


def row(count: int, side: int, work: Path) -> dict[str, Any]:
    """All steps on one number of images."""
    folder, parts = work / "run", work / "parts"
    make_run(folder, count, side)
    split(folder, count, 4, parts)
    figures: dict[str, Any] = {"images": count}
    for what in ("page", "records", "resume"):
        figures |= step(what, folder, count)
    pages = [folder / "index.html", *folder.glob("pages/*")]
    figures["page_mb"] = round(sum(file.stat().st_size for file in pages) / 1e6, 1)
    if PROGRAM is not None:
        figures |= open_page(folder / "index.html", work / "profile", "page")
        jobs = [Job(part, part.name, part.name) for part in sorted(parts.iterdir())]
        write_page(parts, "sweep", jobs)  # no two of the jobs have a prompt in common: every image has a row
        figures |= open_page(parts / "index.html", work / "profile", "sweep")
    figures |= step("merge", parts, count)
    if len(list((parts / IMAGES).iterdir())) != count:
        raise SettingsError(f"merge: wrote {len(list((parts / IMAGES).iterdir()))} of {count} images")
    return figures


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for count in settings.images:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            rows.append(row(count, settings.side, Path(work)))
        print(rows[-1], file=sys.stderr, flush=True)
        result = report([__file__, *arguments], rows)
        if settings.json:  # after each, since the next may take long
            write_json(settings.json, result)
    print_table(rows)
    return result


if __name__ == "__main__":
    main(run)
