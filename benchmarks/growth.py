"""Measure how cost grows: seconds and peak memory over size, batch and number of prompts, and how long a start takes.

Every row is a process of its own, since memory that was used once is counted for good. Steps and decoding are those of
Stable Diffusion 1.5's architecture with random weights, with ``speed=rounding``; prompts and starts those of the
embedded model, by the command itself.

Example::

    python benchmarks/growth.py --json growth.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.line_plot import Line, Panel, draw_panels
from benchmarks.report import ROOT, Parser, print_table, report, write_json
from sdmodule.errors import SettingsError

STEP = """
import json, sys
import torch
from benchmarks.sampling_peers import Work, presets
from benchmarks.sampling_speed import models
from sdmodule.callbacks.timing import peak_memory
size, batch = map(int, sys.argv[1:])
plain, best = models(None)
loaded = peak_memory(best.unet.device)
one = next(c for c in presets(plain, best, compile=False) if c.name == "speed=rounding")
side = size // 8
work = Work(size, batch, torch.randn(batch, 4, side, side), 7.5)
with one.ready():
    made = one.sample(work, 2)
used = {"step_seconds": made.steps[-1], "decode_seconds": made.decode}
print(json.dumps(used | {"loaded": loaded, "peak": peak_memory(best.unet.device)}))
"""
"""A guided step of some size and batch, and its decoding."""

START = """
import os, sys, time
from sdmodule.cli import predict as cli
from sdmodule.cli.main import predict_main
def stop(*_):
    print(time.time() - float(os.environ["STARTED"]), flush=True)
    os._exit(0)
def until_the_first_step(cfg):
    from sdmodule.sampling.guided_denoiser import GuidedUNet
    GuidedUNet.__call__ = stop
    return build(cfg)
build, cli.build_trainer = cli.build_trainer, until_the_first_step
sys.argv = ["predict.py", "prompt=a red circle", "output_dir=" + sys.argv[1]]
predict_main()
"""
"""The command, up to its first step."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    parser = Parser(description="Measure how cost grows.", allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 768, 1024], help="pixels, at batch 1")
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 4, 8, 16], help="images at once, at 512 pixels")
    parser.add_argument("--prompts", type=int, nargs="*", default=[10, 100, 1000, 10000], help="prompts of a run")
    parser.add_argument("--starts", type=int, default=5, help="how often the start is measured")
    parser.add_argument("--quick", action="store_true", help="two numbers of prompts and two starts alone")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--plot", type=Path, help="PNG to draw them in")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.sizes, settings.batches, settings.prompts, settings.starts = [], [], [10, 50], 2
    if min([*settings.sizes, *settings.batches, *settings.prompts, settings.starts]) < 1:
        raise SettingsError("a size, a batch or a number is less than 1; give 1 or more.")
    return settings


def process(program: str, *arguments: object) -> str:
    """Run a program in a process of its own, and give the last line that it printed.

    Raises:
        SettingsError: if it failed, for want of memory perhaps.
    """
    environment = os.environ | {"STARTED": repr(time.time()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SettingsError(f"a process ended with {done.returncode}: {done.stderr[-200:]}")
    return done.stdout.strip().splitlines()[-1]


def step_row(size: int, batch: int) -> dict[str, Any]:
    """A guided step and its decoding; an image that does not fit into memory says so."""
    row: dict[str, Any] = {"what": "step", "size": size, "batch": batch}
    try:
        used = json.loads(process(STEP, size, batch))
    except SettingsError as error:
        return row | {"failed": str(error)}
    return row | {
        "seconds": round(used["step_seconds"], 2),
        "decode_seconds": round(used["decode_seconds"], 2),
        "peak_memory_gib": round(used["peak"] / 2**30, 2),
        "above_weights_gib": round((used["peak"] - used["loaded"]) / 2**30, 2),
    }


def prompts_row(count: int, work: Path) -> dict[str, Any]:
    """A run of many prompts in one step each, by the command."""
    (work / "prompts.txt").write_text("".join(f"a red circle, number {k}\n" for k in range(count)))
    out = work / f"prompts-{count}"
    command = [sys.executable, str(ROOT / "predict.py"), f"prompts={work / 'prompts.txt'}", "steps=1", "batch_size=10"]
    start = time.perf_counter()
    done = subprocess.run([*command, f"output_dir={out}", "progress=false"], capture_output=True, text=True)
    if done.returncode:
        return {"what": "prompts", "prompts": count, "failed": done.stderr[-200:]}
    timings = json.loads((out / "timings.json").read_text())
    return {
        "what": "prompts",
        "prompts": count,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(timings["peak_memory_bytes"] / 2**30, 2),
    }


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw time and memory over side, batch and number of prompts, each as a share of its largest."""
    steps = [line for line in lines if line["what"] == "step" and "seconds" in line]
    groups = {
        "side in pixels": ("size", [line for line in steps if line["batch"] == 1]),
        "images at once": ("batch", [line for line in steps if line["size"] == 512]),
        "prompts of a run": ("prompts", [line for line in lines if line["what"] == "prompts" and "seconds" in line]),
    }
    panels = []
    for x, (key, found) in groups.items():
        if not found:
            continue
        most = {name: max(line[name] for line in found) for name in ("seconds", "peak_memory_gib")}
        shown = {"seconds": f"seconds, at most {most['seconds']:.3g}"}
        shown["peak_memory_gib"] = f"peak memory, at most {most['peak_memory_gib']:.3g} GiB"
        curves = [
            Line(title, [(line[key], line[name] / most[name]) for line in sorted(found, key=lambda one: one[key])])
            for name, title in shown.items()
        ]
        panels.append(Panel(f"over {x}", x, "share of the most", curves))
    draw_panels(panels).save(path)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    result: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        nonlocal result
        lines.append(row)
        print(row, file=sys.stderr, flush=True)
        result = report([__file__, *arguments], lines) | {"threads": torch.get_num_threads()}
        if settings.json:  # after each, since the next may take long
            write_json(settings.json, result)

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        starts = [float(process(START, work / "start")) for _ in range(settings.starts)]
        add({"what": "start to first step", "seconds": round(statistics.median(starts), 2), "at_most": 6.0})
        for count in settings.prompts:
            add(prompts_row(count, work))
        for size, batch in [*((s, 1) for s in settings.sizes), *((512, b) for b in settings.batches)]:
            add(step_row(size, batch))
    if settings.plot:
        draw(lines, settings.plot)
    print_table(lines)
    return result


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except SettingsError as error:
        sys.exit(str(error))
