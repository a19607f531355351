"""Measure this package beside its alternatives with one command.

``sampling``: steps and whole images on Stable Diffusion 1.5's architecture and on the embedded model, and how often
images follow their prompts with the presets. ``training``: LoRA on the large architecture, full fine-tuning of the
embedded model. ``growth``: how time and memory grow, the start-up time, and runs of many images. ``kernels``: the CPU
kernels of ``sdmodule.speed.cpu`` beside torch's. Each writes JSON, and some a plot, into ``benchmarks/results`` or the
folder of ``--results``; ``--quick`` takes minutes, with fewer rounds and without the large models.

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
    "growth": [("growth", []), ("growing_pages", [])],
    "kernels": [("attention", []), ("layers", []), ("layers_float32", ["--precision", "float32"])],
}
"""For each kind, the name of each result, which starts with that of its script, and the script's arguments."""

SCRIPTS = ("sampling_speed", "prompt_following", "training_speed", "growth", "growing_pages", "attention", "layers")

DRAWN = ("sampling_speed", "training_speed", "growth")
"""Scripts that also plot."""

ONLY_WITHOUT_QUICK = ("sampling_speed",)
"""Results that ``--quick`` leaves out."""


def commands(kinds: Sequence[str], quick: bool, results: Path) -> list[list[str]]:
    """The commands of some kinds, in order."""
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
    """Run the benchmarks, each in its own process; the exit status is 1 if one of them fails."""
    parser = argparse.ArgumentParser(description="Measure this package beside its alternatives.", allow_abbrev=False)
    parser.add_argument("kind", choices=[*RUNS, "all"])
    parser.add_argument("--quick", action="store_true", help="a shortened run, in minutes; not for publication")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the JSON files")
    settings = parser.parse_args()
    kinds = list(RUNS) if settings.kind == "all" else [settings.kind]
    if not torch.cuda.is_available():
        print("No CUDA GPU found: measuring on CPU.")
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
