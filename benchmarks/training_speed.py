"""Measure training beside the loop of diffusers' scripts: samples per second and peak memory.

Stable Diffusion 1.5's architecture (random weights) with a LoRA adapter, and full fine-tuning of the embedded model, on
the same images, batch size and precision. Variants run in turn in one process; the first steps of each turn are the
warm-up, and figures are medians of the others. The time to fill the cache is reported separately.

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

from benchmarks.plots import Bar, save_bars
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from benchmarks.tome_runs import load
from benchmarks.training_peers import Task, make_module, ours, prepare_unet, script, write_images
from sdmodule.cli.trainer import supports_bfloat16
from sdmodule.components.checkpoint import Components
from sdmodule.speed.compile import COMPILE
from sdmodule.training.activation_checkpointing import CHECKPOINTING, checkpoint_blocks

CAPTIONS = ("a red circle on a blue background", "a small green star at the top on a white background")
WARMUP = 2
"""First steps of a turn, which are not timed."""


@dataclass
class Variant:
    """One row of the table: how to train for a number of steps, and the measurements."""

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
    parser = Parser(
        "Measure training beside the loop of diffusers' scripts.",
        quick="the embedded model only, one turn of two steps",
    )
    parser.add_argument("--size", type=int, default=512 if gpu else 256, help="pixels of the large model")
    parser.add_argument("--batch", type=int, default=8 if gpu else 1, help="batch size of the large model")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument(
        "--compile", action="store_true", help="also ours with compiled blocks, and tiny compiled as a whole"
    )
    parser.add_argument("--model", choices=["all", "sd15", "tiny"], default="all")
    parser.add_argument("--plot", type=Path, help="PNG to plot them in")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.model, settings.rounds, settings.steps = "tiny", 1, 2
    check_counts(settings, "size", "batch", "rounds", "steps")
    return settings


def variants(settings: argparse.Namespace, work: Path, precision: str) -> list[Variant]:
    """The variants to measure, each model's peer first."""
    found: list[Variant] = []
    if settings.model in ("all", "sd15"):
        task = Task(work / "large", settings.size, settings.batch, True, precision, work)
        parts = prepare(load(None, "float32"), task)
        found += model_variants("SD 1.5, random, LoRA", parts, task, 1.5, ("blocks",) if settings.compile else ())
        for which in CHECKPOINTING[1:]:
            run = checkpointed(parts, task, which)
            found.append(Variant("SD 1.5, random, LoRA", f"cache=all, checkpointing={which}", task, run))
    if settings.model in ("all", "tiny"):
        task = Task(work / "small", 64, 16, False, precision, work)
        compiled = COMPILE[1:] if settings.compile else ()
        found += model_variants("tiny, full", prepare(load("tiny", "float32"), task), task, 2.0, compiled)
    return found


def prepare(parts: Components, task: Task) -> Components:
    """Make parts trainable, and write images to train on."""
    for network in parts.networks.values():
        network.to(memory_format=torch.contiguous_format)
    prepare_unet(parts.unet, task.lora)
    write_images(task.folder, 8 * task.batch, task.size, CAPTIONS)
    return parts


def model_variants(model: str, parts: Components, task: Task, needed: float, compiled: Sequence[str]) -> list[Variant]:
    """The peer and ours, which keep training one model, and ours on compiled copies of it."""
    module = make_module(parts)
    found = [
        Variant(model, "diffusers' script", task, lambda steps: script(parts, task, steps)),
        Variant(model, "cache=all", task, lambda steps: ours(module, task, steps), needed),
    ]
    for which in compiled:
        run = partial(ours, make_module(copy.deepcopy(parts), which), task)
        found.append(Variant(model, f"cache=all, compile={which}", task, run, needed))
    return found


def checkpointed(parts: Components, task: Task, which: str) -> Callable[[int], list[float]]:
    """Ours with activation checkpointing."""

    def run(steps: int) -> list[float]:
        checkpoint_blocks([parts.unet], which)
        try:
            return ours(make_module(parts), task, steps)
        finally:
            parts.unet.disable_gradient_checkpointing()

    return run


def reset_peak_memory() -> None:
    """Count peak memory from here on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def peak_memory() -> int:
    """Peak memory in bytes since `reset_peak_memory`, of the GPU or else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measure(found: Sequence[Variant], settings: argparse.Namespace) -> None:
    """Run all, in turn."""
    for turn in range(settings.rounds):
        for one in found:
            reset_peak_memory()
            start = time.perf_counter()
            seconds = one.run(WARMUP + settings.steps)
            one.around.append(time.perf_counter() - start - sum(seconds))
            one.seconds += seconds[WARMUP:]
            one.memory = max(one.memory, peak_memory())
            print(f"{turn} {one.model}, {one.name}: {statistics.median(seconds):.3f} s per step", file=sys.stderr)


def rows(found: Sequence[Variant]) -> list[dict[str, Any]]:
    """Rows; ratios are over the peer of the same model."""
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
    """Plot the speed-up of each over diffusers' script."""
    charts = []
    for model in dict.fromkeys(line["model"] for line in lines):
        here = [line for line in lines if line["model"] == model]
        title = f"{model}, {here[0]['size']} pixels, batch {here[0]['batch']}: speed-up over diffusers' script"
        charts.append((title, [Bar(line["variant"], line["over_script"], "cache" in line["variant"]) for line in here]))
    save_bars(charts, path)


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
    main(run)
