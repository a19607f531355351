"""Measure this package beside its alternatives, all of it by one command.

``sampling``: steps and whole images on Stable Diffusion 1.5's architecture and on the embedded model, and how often
the lossy presets obey. ``training``: LoRA on the large architecture, full fine-tuning of the embedded model.
``growth``: how time and memory grow, and how long a start takes. Each writes JSON, and a plot where one helps, into
``benchmarks/results`` or the folder of ``--results``; ``--quick`` takes minutes, with fewer rounds and nothing large.

Example::

    python benchmarks/run.py all
    python benchmarks/run.py sampling --quick --results outputs/benchmarks
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent

RUNS: dict[str, list[tuple[str, list[str]]]] = {
    "sampling": [
        ("sampling_speed", []),
        ("sampling_speed_tiny", ["--pretrained", "tiny"]),
        ("prompt_following_speed_rounding", ["speed=rounding"]),
        ("prompt_following_speed_fast", ["speed=fast"]),
        ("prompt_following_speed_turbo", ["speed=turbo"]),
    ],
    "training": [
        ("training_speed", []),
        ("training_speed_tiny", ["--model", "tiny", "--compile", "--steps", "8"]),
    ],
    "growth": [("growth", [])],
}
"""For each kind, the file of each result and the arguments that make it; its name begins with the script's."""

SCRIPTS = ("sampling_speed", "prompt_following", "training_speed", "growth")

DRAWN = ("sampling_speed", "training_speed", "growth")
"""Those that draw a plot too."""

ONLY_WITHOUT_QUICK = ("sampling_speed",)
"""What takes longer than a quick look."""


def commands(kinds: Sequence[str], quick: bool, results: Path) -> list[list[str]]:
    """What is run for some kinds, in order."""
    found = []
    for kind in kinds:
        for name, arguments in RUNS[kind]:
            if quick and name in ONLY_WITHOUT_QUICK:
                continue
            script = next(script for script in SCRIPTS if name.startswith(script))
            more = [*arguments, *(["--quick"] if quick else []), "--json", str(results / f"{name}.json")]
            if script in DRAWN:
                more += ["--plot", str(results / f"{name}.png")]
            found.append([sys.executable, str(FOLDER / f"{script}.py"), *more])
    return found


def main() -> None:
    """Run what was asked for, one process each; ends with 1 if any of them failed."""
    parser = argparse.ArgumentParser(description="Measure this package beside its alternatives.", allow_abbrev=False)
    parser.add_argument("kind", choices=[*RUNS, "all"])
    parser.add_argument("--quick", action="store_true", help="in minutes, not for figures to be quoted")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the JSON files")
    settings = parser.parse_args()
    kinds = list(RUNS) if settings.kind == "all" else [settings.kind]
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here: all is measured on CPU.")
    failed = []
    for command in commands(kinds, settings.quick, settings.results):
        shown = " ".join(["python", Path(command[1]).name, *command[2:]])
        print(f"\n{shown}", flush=True)
        start = time.perf_counter()
        if subprocess.run(command).returncode:
            failed.append(shown)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
