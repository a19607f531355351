"""Check and measure everything on a GPU with one command of at most eight minutes on an H100-class card.

Sections, in this order: ``correctness``, ``syncs``, ``sampling``, ``training`` and ``table`` (the published table of
the project that this one began as). Each has a budget; what does not fit into it is skipped with a line. The JSON is
written after every section, so that nothing is lost when time runs out. No network is needed: models are the embedded
one, and the architectures of Stable Diffusion 1.5 and XL with random weights.

The exit status is 1 if a check failed.

Example::

    make gpu
    python benchmarks/gpu.py --only sampling,training --minutes 5
    python benchmarks/gpu.py --dry-run
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, print_table, report, write_json

SECTIONS = {"correctness": 110, "syncs": 20, "sampling": 230, "training": 70, "table": 40}
"""Seconds that each section may take of eight minutes; its function is in ``benchmarks/gpu_<name>.py``."""

NO_GPU = "benchmarks/gpu.py: needs an NVIDIA GPU, and torch finds none here; --dry-run walks through it on the CPU."


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description="Check and measure everything on a GPU.", allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="walk through it on the CPU with the embedded model")
    parser.add_argument("--minutes", type=float, default=8, help="of all sections together")
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(SECTIONS), help="sections")
    parser.add_argument("--json", type=Path, help="file of the results; benchmarks/results/gpu_<card>.json")
    settings = parser.parse_args(arguments)
    unknown = [name for name in settings.only if name not in SECTIONS]
    if unknown or settings.minutes <= 0:
        sys.exit(f"--only, --minutes: sections are {', '.join(SECTIONS)}, and minutes more than 0.")
    if settings.json is None and not settings.dry_run:
        settings.json = ROOT / "benchmarks" / "results" / f"gpu_{card()}.json"
    return settings


def card() -> str:
    """The card's name for a file: ``h100_80gb_hbm3``."""
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ") if torch.cuda.is_available() else "none"
    return re.sub(r"\W+", "_", name)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the sections; returns what the JSON holds."""
    settings = parse(arguments)
    if not settings.dry_run and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    from benchmarks.gpu_run import GpuRun  # takes seconds

    warnings.simplefilter("ignore")
    began = time.perf_counter()
    with TemporaryDirectory(prefix="sdmodule-gpu-", dir=memory_folder()) as folder:
        work = GpuRun(settings.dry_run, Path(folder), began + 60 * settings.minutes)
        for name in settings.only:
            section = getattr(import_module(f"benchmarks.gpu_{name}"), name)
            work.run_section(name, SECTIONS[name] * settings.minutes / 8, section)
            result = {
                **report([__file__, *arguments], work.rows),
                "dry_run": settings.dry_run,
                "seconds": round(time.perf_counter() - began, 1),
                "failed": [f"{row['section']}: {row['what']}" for row in work.rows if row.get("passed") is False],
            }
            if settings.json:
                write_json(settings.json, result)
    for name in settings.only:
        print(f"\n{name}")
        shown = [row for row in work.rows if row["section"] == name]
        print_table([{key: str(row[key])[:60] for key in row if key != "section"} for row in shown])
    print(
        f"\n{len(result['failed'])} checks failed in {result['seconds']} s" + f"; {settings.json}" * bool(settings.json)
    )
    return result


def memory_folder() -> str | None:
    """A folder in memory for temporary files, or None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(1 if run(sys.argv[1:])["failed"] else 0)
