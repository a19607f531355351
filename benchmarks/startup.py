"""Measure how long a command takes that samples and trains nothing: help, version, settings, and a wrong key.

Each command runs in a process of its own, as typed in a terminal; the first run, which reads the files from disk, does
not count.

Example::

    python benchmarks/startup.py --json startup.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, Parser, check_counts, main, print_table, report, write_json

COMMANDS = (
    "predict.py --help",
    "predict.py --help sampler",
    "predict.py --version",
    "predict.py --cfg job",
    "predict.py stepz=20",
    "predict.py sampler=dddim",
    "predict.py --prompt x",
    "train.py --help",
    "train.py max_steps=500",
    "-m sdmodule --version",
)
"""What is typed after ``python``."""


def measure(command: str, runs: int) -> dict[str, Any]:
    """Row of a command: medians of its processor seconds and its wall seconds."""
    processor, wall = [], []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(runs + 1):
        before, start = os.times(), time.perf_counter()
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=environment, capture_output=True)
        wall.append(time.perf_counter() - start)
        after = os.times()
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return {
        "command": f"python {command}",
        "runs": runs,
        "processor_seconds": round(statistics.median(processor[1:]), 2),
        "wall_seconds": round(statistics.median(wall[1:]), 2),
    }


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, and write the report that ``--json`` asks for."""
    parser = Parser("Measure the start of the commands.", quick="two runs of each command instead of nine")
    parser.add_argument("--runs", type=int, default=9, help="runs of each command")
    settings = parser.parse_args(arguments)
    check_counts(settings, "runs")
    rows = [measure(command, 2 if settings.quick else settings.runs) for command in COMMANDS]
    print_table(rows)
    result = report([__file__, *arguments], rows)
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
