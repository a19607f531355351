"""Measure the start of a training on a streamed set over the number of samples: seconds, memory, and a resume.

A set is one real shard under as many names as the number of samples asks for, and an index of all of them; it is read
over HTTP from a server on this machine. Every row is a process of its own, which has imported everything before the
clock starts. What is measured is what ``train.py`` does beside the model: read the index, make the order and the
loader, fetch the first shards, and load a batch; then the same in the middle of an epoch, as a resumed run does.

Example::

    python benchmarks/streaming.py --json streaming.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, Parser, check_counts, main, print_table, report, write_json
from sdmodule.data.streaming.index import INDEX, ShardIndex
from sdmodule.data.streaming.packing import TRAINING, pack
from sdmodule.data.toy.dataset import ShapesDataset
from sdmodule.errors import SettingsError

SHARD = 1000
"""Samples in a shard."""

BUCKETS = ((64, 64), (48, 80), (80, 48))
"""Sizes that the shards of a set in buckets are said to be for; every sample is of 32 pixels, and resized."""

START = """
import json, sys, time
from sdmodule.data.streaming.datamodule import StreamingDataModule
from sdmodule.data.streaming.sampler import StreamSampler
import torch, aiohttp, fsspec.implementations.http
import PIL.PngImagePlugin
torch.set_num_threads(1)
def memory(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024 / 1e6
url, folder, buckets, batch, devices = sys.argv[1], sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]), int(sys.argv[5])
before, start = memory("VmRSS"), time.perf_counter()
data = StreamingDataModule(url, resolution=64, batch_size=batch, buckets=buckets, cache_folder=folder, num_workers=0)
data.setup("fit")
ready = time.perf_counter() - start
batches = iter(data.train_dataloader())
next(batches)
first = time.perf_counter() - start
for _ in range(20):
    next(batches)
start = time.perf_counter()
sampler = StreamSampler(data.train_set, data.samples, batch, devices, devices - 1, 0, data.window)
sampler.resume(3, sampler.batches // 2, {"epoch": 3, "batch_size": batch * devices, "start": None, "number": 0})
next(iter(sampler))
resume, peak = time.perf_counter() - start, memory("VmHWM") - before
print(json.dumps({"ready": ready, "first": first, "resume": resume, "peak": peak, "samples": len(data.samples)}))
"""
"""Program: the start of a training on a set, and the sampler of a resumed one."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    parser = Parser("Measure the start of a training on a streamed set.", quick="two small sets only")
    sizes = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
    parser.add_argument("--samples", type=int, nargs="*", default=sizes, help="numbers of samples")
    parser.add_argument("--batch", type=int, default=8, help="images of a batch")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.samples = [3_000, 30_000]
    check_counts(settings, "samples", "batch")
    return settings


def real_shard(folder: Path) -> dict[str, Any]:
    """Pack one shard; returns what an index says of it."""
    images = ShapesDataset(SHARD, size=32)
    about: dict[str, Any] = {"seed": 0, "buckets": False, "processes": 0, "resolution": None, "settings": "benchmark"}
    index = pack({TRAINING: images}, folder, samples=SHARD, **about)
    return {"file": folder / index.names[0], "bytes": int(index.bytes[0]), "digest": index.digests[0]}


def make_set(folder: Path, shard: dict[str, Any], samples: int, buckets: bool) -> None:
    """A set whose shards are all the same file."""
    folder.mkdir()
    records = []
    for number in range(-(-samples // SHARD)):
        name = f"train-{number:06}.tar"
        os.link(shard["file"], folder / name)
        size = random.Random(number).choice(BUCKETS) if buckets else None
        records.append(
            {"name": name, "samples": SHARD, "bytes": shard["bytes"], "digest": shard["digest"], "bucket": size}
        )
    (folder / INDEX).write_text(ShardIndex.of(records, resolution=(64, 64)).text())


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server that gives out a folder, and logs what it is asked for."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with log.open("w") as requests:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=requests, text=True)
        try:
            assert server.stdout is not None
            port = re.search(r"port (\d+)", server.stdout.readline())
            assert port is not None
            yield f"http://127.0.0.1:{port[1]}"
        finally:
            server.kill()
            server.wait()


def row(work: Path, shard: dict[str, Any], samples: int, buckets: bool, batch: int) -> dict[str, Any]:
    """Row of a set.

    Raises:
        SettingsError: if the process failed.
    """
    folder = work / f"{samples}-{buckets}"
    make_set(folder, shard, samples, buckets)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with served(folder, work / "requests") as url:
        command = [sys.executable, "-c", START, url, work / f"{folder.name}-shards", int(buckets), batch, 8]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SettingsError(f"a process failed with status {done.returncode}: {done.stderr[-300:]}")
    used = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "samples": used["samples"],
        "shards": -(-samples // SHARD),
        "buckets": len(BUCKETS) if buckets else 1,
        "index_mb": round((folder / INDEX).stat().st_size / 1e6, 2),
        "ready_seconds": round(used["ready"], 2),
        "first_batch_seconds": round(used["first"], 2),
        "resume_seconds": round(used["resume"], 2),
        "memory_mb": round(used["peak"], 0),
    }


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, and write the report that ``--json`` asks for."""
    settings = parse(arguments)
    with tempfile.TemporaryDirectory() as place:
        shard = real_shard(Path(place) / "shard")
        wanted = [(samples, False) for samples in settings.samples] + [(max(settings.samples), True)]
        rows = [row(Path(place), shard, samples, buckets, settings.batch) for samples, buckets in wanted]
    print_table(rows)
    result = report([__file__, *arguments], rows)
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
