"""Measure how cost grows: time and peak memory over image size, batch and number of prompts, and the start-up time.

Every row is a process of its own, because peak memory never goes down. Steps and decoding are those of Stable Diffusion
1.5's architecture with random weights and ``speed=rounding``; prompts and starts those of ``predict.py`` with the
embedded model.

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

from benchmarks.plots import Line, Panel, save_panels
from benchmarks.report import ROOT, Parser, check_counts, main, print_table, report, write_json
from sdmodule.errors import SettingsError

STEP = """
import json, sys
import torch
from benchmarks.sampling_peers import Work, presets
from benchmarks.sampling_speed import models
from sdmodule.callbacks.timing_figures import peak_memory
size, batch = map(int, sys.argv[1:])
plain, best = models(None)
loaded = peak_memory(best.unet.device)
rounding = next(c for c in presets(plain, best, compile=False) if c.name == "speed=rounding")
side = size // 8
work = Work(size, batch, torch.randn(batch, 4, side, side), 7.5)
with rounding.ready():
    run = rounding.sample(work, 2)
used = {"step_seconds": run.steps[-1], "decode_seconds": run.decode}
print(json.dumps(used | {"loaded": loaded, "peak": peak_memory(best.unet.device)}))
"""
"""Program: one guided step and decoding, of a size and batch."""

START = """
import os, sys, time
from sdmodule.cli import predict as cli
from sdmodule.cli.main import predict_main
def stop(*_):
    print(time.time() - float(os.environ["STARTED"]), flush=True)
    os._exit(0)
def build_and_stop_at_first_step(cfg):
    from sdmodule.sampling.guided_denoiser import GuidedDenoiser
    GuidedDenoiser.__call__ = stop
    return build(cfg)
build, cli.build_trainer = cli.build_trainer, build_and_stop_at_first_step
sys.argv = ["predict.py", "prompt=a red circle", "output_dir=" + sys.argv[1]]
predict_main()
"""
"""Program: ``predict.py`` up to its first step."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    parser = Parser("Measure how cost grows.", quick="two numbers of prompts and two starts only")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 768, 1024], help="pixels, at batch 1")
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 4, 8, 16], help="batch sizes, at 512 pixels")
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[10, 100, 1000, 10000], help="numbers of prompts of a run"
    )
    parser.add_argument("--starts", type=int, default=5, help="number of starts")
    parser.add_argument("--plot", type=Path, help="PNG to plot them in")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.sizes, settings.batches, settings.prompts, settings.starts = [], [], [10, 50], 2
    check_counts(settings, "sizes", "batches", "prompts", "starts")
    return settings


def process(program: str, *arguments: object) -> str:
    """Run a Python program in a process of its own, and return the last line that it printed.

    Raises:
        SettingsError: if it failed, for example out of memory.
    """
    environment = os.environ | {"STARTED": repr(time.time()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SettingsError(f"a process failed with status {done.returncode}: {done.stderr[-200:]}")
    return done.stdout.strip().splitlines()[-1]


def step_row(size: int, batch: int) -> dict[str, Any]:
    """Row of a guided step and its decoding; or why it failed, such as out of memory."""
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
    """Row of a run of ``predict.py`` with many prompts of one step each."""
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
    """Plot time and memory over image size, batch size and number of prompts, each as a share of its maximum."""
    steps = [line for line in lines if line["what"] == "step" and "seconds" in line]
    groups = {
        "image size in pixels": ("size", [line for line in steps if line["batch"] == 1]),
        "batch size": ("batch", [line for line in steps if line["size"] == 512]),
        "prompts": ("prompts", [line for line in lines if line["what"] == "prompts" and "seconds" in line]),
    }
    panels = []
    for x, (key, found) in groups.items():
        if not found:
            continue
        most = {name: max(line[name] for line in found) for name in ("seconds", "peak_memory_gib")}
        shown = {"seconds": f"seconds, maximum {most['seconds']:.3g}"}
        shown["peak_memory_gib"] = f"peak memory, maximum {most['peak_memory_gib']:.3g} GiB"
        curves = [
            Line(title, [(line[key], line[name] / most[name]) for line in sorted(found, key=lambda one: one[key])])
            for name, title in shown.items()
        ]
        panels.append(Panel(f"Cost over {x}", x, "share of the maximum", curves))
    save_panels(panels, path)


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
    main(run)
