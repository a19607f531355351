"""Measure training beside the loop of diffusers' scripts: samples a second, and peak memory.

Stable Diffusion 1.5's architecture (random weights) with a LoRA adapter, and the embedded model in full, on the same
images, batch and precision. Each is run in turn, in one process; a turn's first steps are its warm-up and medians
are of the others. What fills the cache is told apart, since it is done once for all trainings.

Example::

    python benchmarks/training_speed.py --json training_speed.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bar_plot import Bar, draw_bars
from benchmarks.report import Parser, print_table, report, write_json
from benchmarks.tome_runs import load
from benchmarks.training_peers import Task, module_of, ours, script, with_adapter, write_images
from sdmodule.cli.trainer import supports_bfloat16
from sdmodule.components.checkpoint import MODELS, Components
from sdmodule.errors import SettingsError
from sdmodule.speed.compile import COMPILE
from sdmodule.training.activation_checkpointing import CHECKPOINTING, checkpoint_blocks

CAPTIONS = ("a red circle on a blue background", "a small green star at the top on a white background")
WARMUP = 2
"""First steps of a turn, which are not counted."""


@dataclass
class Variant:
    """One line of the table: how it trains for a number of steps, and what was seen."""

    model: str
    name: str
    task: Task
    run: Callable[[int], list[float]]
    needed: float | None = None
    seconds: list[float] = field(default_factory=list)
    around: list[float] = field(default_factory=list)
    memory: int = 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    gpu = torch.cuda.is_available()
    parser = Parser(description="Measure training beside the loop of diffusers' scripts.", allow_abbrev=False)
    parser.add_argument("--size", type=int, default=512 if gpu else 256, help="pixels, of the large model")
    parser.add_argument("--batch", type=int, default=8 if gpu else 1, help="images a step, of the large model")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--compile", action="store_true", help="ours again, its blocks compiled, and tiny whole")
    parser.add_argument("--model", choices=["all", "sd15", "tiny"], default="all")
    parser.add_argument("--quick", action="store_true", help="the embedded model alone, one turn of two steps")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--plot", type=Path, help="PNG to draw them in")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.model, settings.rounds, settings.steps = "tiny", 1, 2
    for key in ("size", "batch", "rounds", "steps"):
        if getattr(settings, key) < 1:
            raise SettingsError(f"--{key} {getattr(settings, key)} is too small; give 1 or more.")
    return settings


def variants(settings: argparse.Namespace, work: Path, precision: str) -> list[Variant]:
    """What is measured, each model's peer first."""
    found: list[Variant] = []
    if settings.model in ("all", "sd15"):
        task = Task(work / "large", settings.size, settings.batch, True, precision, work)
        parts = prepare(load(None, "float32"), task)
        found += of_model("SD 1.5, random, LoRA", parts, task, 1.5, ("blocks",) if settings.compile else ())
        for which in CHECKPOINTING[1:]:
            run = checkpointed(parts, task, which)
            found.append(Variant("SD 1.5, random, LoRA", f"cache=all, checkpointing={which}", task, run))
    if settings.model in ("all", "tiny"):
        task = Task(work / "small", 64, 16, False, precision, work)
        compiled = COMPILE[1:] if settings.compile else ()
        found += of_model("tiny, full", prepare(load("tiny", "float32"), task), task, 2.0, compiled)
    return found


def prepare(parts: Components, task: Task) -> Components:
    """Parts as a checkpoint gives them, with what is to be trained, and images to train on."""
    for name in MODELS:
        getattr(parts, name).to(memory_format=torch.contiguous_format)
    with_adapter(parts.unet, task.lora)
    write_images(task.folder, 8 * task.batch, task.size, CAPTIONS)
    return parts


def of_model(model: str, parts: Components, task: Task, needed: float, compiled: Sequence[str]) -> list[Variant]:
    """The peer and ours on one model, which both go on training, and copies of it that are compiled."""
    module = module_of(parts)
    found = [
        Variant(model, "diffusers' script", task, lambda steps: script(parts, task, steps)),
        Variant(model, "cache=all", task, lambda steps: ours(module, task, steps), needed),
    ]
    for which in compiled:
        run = partial(ours, module_of(copy.deepcopy(parts), which), task)
        found.append(Variant(model, f"cache=all, compile={which}", task, run, needed))
    return found


def checkpointed(parts: Components, task: Task, which: str) -> Callable[[int], list[float]]:
    """Ours, with some activations computed again."""

    def run(steps: int) -> list[float]:
        checkpoint_blocks(parts.unet, which)
        try:
            return ours(module_of(parts), task, steps)
        finally:
            parts.unet.disable_gradient_checkpointing()

    return run


def forget_peak() -> None:
    """Count peak memory from here on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak() -> int:
    """Bytes that were in use at most since `forget_peak`: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measure(found: Sequence[Variant], settings: argparse.Namespace) -> None:
    """Run all, in turn."""
    for turn in range(settings.rounds):
        for one in found:
            forget_peak()
            start = time.perf_counter()
            seconds = one.run(WARMUP + settings.steps)
            one.around.append(time.perf_counter() - start - sum(seconds))
            one.seconds += seconds[WARMUP:]
            one.memory = max(one.memory, peak())
            print(f"{turn} {one.model}, {one.name}: {statistics.median(seconds):.3f} s a step", file=sys.stderr)


def rows(found: Sequence[Variant]) -> list[dict[str, Any]]:
    """A row of each; ratios are over the peer of the same model."""
    lines = []
    for one in found:
        peer = next(other for other in found if other.model == one.model)
        step = statistics.median(one.seconds)
        ratio = statistics.median(peer.seconds) / step
        lines.append(
            {
                "model": one.model,
                "variant": one.name,
                "size": one.task.size,
                "batch": one.task.batch,
                "precision": one.task.precision,
                "step_seconds": float(f"{step:.4g}"),
                "samples_per_second": float(f"{one.task.batch / step:.4g}"),
                "over_script": round(ratio, 3),
                "peak_memory_gib": round(one.memory / 2**30, 2),
                "around_seconds_first": round(one.around[0], 2),
                **({"at_least": one.needed, "met": ratio >= one.needed} if one.needed else {}),
            }
        )
    return lines


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw how many times as fast as the script each is."""
    charts = []
    for model in dict.fromkeys(line["model"] for line in lines):
        here = [line for line in lines if line["model"] == model]
        title = f"{model}, {here[0]['size']} pixels, batch {here[0]['batch']}: times as fast as diffusers' script"
        charts.append((title, [Bar(line["variant"], line["over_script"], "cache" in line["variant"]) for line in here]))
    draw_bars(charts).save(path)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    precision = "bf16-mixed" if supports_bfloat16(device) else "32-true"
    protocol = (
        f"{device}, {torch.get_num_threads()} threads, {precision}; medians of {settings.rounds} turns of "
        f"{settings.steps} steps each, in turn"
    )
    print(protocol)
    with tempfile.TemporaryDirectory() as work:
        found = variants(settings, Path(work), precision)
        measure(found, settings)
    result = report([__file__, *arguments], rows(found)) | {"protocol": protocol}
    print_table(result["rows"])
    if settings.json:
        write_json(settings.json, result)
    if settings.plot:
        draw(result["rows"], settings.plot)
    return result


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except SettingsError as error:
        sys.exit(str(error))
