"""Measure how the start of a training grows with its data: seconds to the first batch, memory, and a worker's memory.

The data are real files, made by the script: tiny images with captions, in a folder, in tar shards and in parquet files.
Each start is a process of its own, with a cache folder of its own: the first start reads every image, the second one
what has changed, which is nothing. Two ranks start at once. The worker is a forked process that looks up the captions
and paths of all images, as loading processes do in an epoch.

Example::

    python benchmarks/data_growth.py --json data_growth.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, Parser, check_counts, main, print_table, report, write_json
from sdmodule.errors import SettingsError

START = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
import sdmodule.module
def memory():
    rows = (line.split() for line in open("/proc/self/smaps_rollup"))
    return {row[0]: int(row[1]) / 1024 for row in rows if row[-1] == "kB"}
kind, place, buckets = sys.argv[1:]
before, processor, start = memory(), time.process_time(), time.perf_counter()
from sdmodule.data.datamodule import HuggingFaceDataModule, ImageFolderDataModule, ShardsDataModule
kinds = {"folder": ImageFolderDataModule, "tar": ShardsDataModule, "parquet": HuggingFaceDataModule}
data = kinds[kind](place, resolution=32, batch_size=4, buckets=buckets == "buckets")
data.setup("fit")
loader = data.train_dataloader()
next(iter(loader))
seconds, processor, after = time.perf_counter() - start, time.process_time() - processor, memory()
reading, writing = os.pipe()
if os.fork() == 0:
    own = memory()["Private_Dirty:"]
    for k in range(len(data.train_set)):
        data.train_set.examples[k]
    os.write(writing, str(memory()["Private_Dirty:"] - own).encode())
    os._exit(0)
os.close(writing)
worker = float(os.read(reading, 64))
os.wait()
found = {"seconds": seconds, "processor_seconds": processor, "worker_mb": worker}
found |= {"memory_mb": after["Rss:"] - before["Rss:"], "own_memory_mb": after["Anonymous:"] - before["Anonymous:"]}
print(json.dumps(found))
"""
"""Program: a start with the data of a kind, up to its first batch."""

PER_SHARD = 10_000
"""Images in a tar or parquet file."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    parser = Parser("Measure how the start of a training grows with its data.", quick="300 images only")
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of images")
    parser.add_argument("--kinds", nargs="+", default=["folder", "tar", "parquet"], help="where the images are")
    parser.add_argument("--label", default="now", help="what the rows are called, such as the version measured")
    parser.add_argument("--beside", type=Path, help="JSON of an earlier run, whose rows come first")
    settings = parser.parse_args(arguments)
    check_counts(settings, "counts")
    if settings.quick:
        settings.counts = [300]
    if unknown := {*settings.kinds} - {"folder", "tar", "parquet"}:
        raise SettingsError(f"--kinds {' '.join(unknown)}: choose among folder, tar and parquet.")
    return settings


def images(count: int) -> Iterator[tuple[str, bytes, str]]:
    """Name, bytes and caption of tiny images of several shapes."""
    shapes = [(16, 16), (24, 12), (12, 24), (20, 13)]
    for k in range(count):
        file = io.BytesIO()
        Image.new("RGB", shapes[k % 4], (k % 256, k // 256 % 256, k // 65536)).save(file, "PNG", compress_level=1)
        yield f"{k:07}", file.getvalue(), f"image number {k} of {count}, with a caption of about the usual length"


def make(kind: str, count: int, place: Path) -> str:
    """Write images; returns what names them as a source."""
    place.mkdir(parents=True)
    if kind == "folder":
        for name, content, caption in images(count):
            folder = place / name[:-3]
            if name.endswith("000"):
                folder.mkdir()
            (folder / f"{name}.png").write_bytes(content)
            (folder / f"{name}.txt").write_text(caption)
        return str(place)
    parts = iter(images(count))
    for number, start in enumerate(range(0, count, PER_SHARD)):
        part = [next(parts) for _ in range(min(PER_SHARD, count - start))]
        (_write_tar if kind == "tar" else _write_parquet)(place / f"train-{number:05}.{kind}", part)
    return f"{place}/*.tar" if kind == "tar" else str(place)


def _write_tar(file: Path, part: Sequence[tuple[str, bytes, str]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content, caption in part:
            for suffix, held in (("png", content), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(held)
                tar.addfile(member, io.BytesIO(held))


def _write_parquet(file: Path, part: Sequence[tuple[str, bytes, str]]) -> None:
    pq.write_table(pa.table({"image": [row[1] for row in part], "text": [row[2] for row in part]}), file)


def start(kind: str, source: str, cache: Path, ranks: int = 1, buckets: str = "") -> dict[str, float]:
    """Start a training in some ranks at once; returns the largest figure of any of them."""
    common = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", START, kind, source, buckets],
            env={**os.environ, **common, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    for one in running:
        output, _ = one.communicate()
        if one.returncode:
            raise SystemExit(f"a start with {source} failed")
        found.append(json.loads(output.splitlines()[-1]))
    return {name: round(max(one[name] for one in found), 2) for name in found[0]}


def measure(kind: str, count: int, label: str) -> Iterator[dict[str, Any]]:
    """Rows of one source: the first start, the second one, one with buckets, and first and second of two ranks."""
    with tempfile.TemporaryDirectory(prefix="data_growth") as name:
        source = make(kind, count, Path(name) / "images")
        own, shared = Path(name) / "cache", Path(name) / "shared"
        starts = {
            "first": (own, 1, ""),
            "second": (own, 1, ""),
            "second, buckets": (own, 1, "buckets"),
            "first, two ranks": (shared, 2, ""),
            "second, two ranks": (shared, 2, ""),
        }
        for what, settings in starts.items():
            yield {"code": label, "images": kind, "number": count, "start": what, **start(kind, source, *settings)}


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, and write the report that ``--json`` asks for."""
    settings = parse(arguments)
    rows = json.loads(settings.beside.read_text())["rows"] if settings.beside else []
    result: dict[str, Any] = {}
    for count in settings.counts:
        for kind in settings.kinds:
            for row in measure(kind, count, settings.label):
                rows.append(row)
                result = report([__file__, *arguments], rows)
                if settings.json:  # after each row, since all of them take long
                    write_json(settings.json, result)
    print_table(rows)
    return result


if __name__ == "__main__":
    main(run)
