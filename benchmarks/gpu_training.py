"""Section ``training`` of ``benchmarks/gpu.py``: full fine-tuning and LoRA beside the loop of diffusers' scripts."""

from __future__ import annotations

import statistics
from typing import Any

from lightning import Callback

from benchmarks.gpu_run import GpuRun
from benchmarks.training_peers import Task, make_module, prepare_unet, script, train_ours, write_images
from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.components.checkpoint import Components

WARMUP = 3
"""First steps of each, which are not counted."""

VARIANTS = ("diffusers' script", "ours", "ours, cache=all")


class Span(Callback):
    """Seconds from the end of one step to the end of another; the device is waited for at these two alone.

    Args:
        run: whose clock is read.
        first: number of the first of them.
        last: of the second.
    """

    def __init__(self, run: GpuRun, first: int, last: int) -> None:
        self.run, self.ends = run, (first, last)
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clock."""
        if trainer.global_step in self.ends:
            self.times.append(self.run.now())


def training(run: GpuRun) -> None:
    """Images per second at 512 pixels: diffusers' loop, ours, and ours with latents and text cached."""
    size, batch, steps = (64, 2, 1) if run.dry else (512, 8, 12)
    folder = run.folder / f"training-{size}"
    write_images(folder, 2 * batch, size, ["a red circle", "a star"])
    for lora in (False, True):
        task = Task(folder, size, batch, lora, "32-true" if run.dry else "bf16-mixed", run.folder)
        for variant in VARIANTS:
            what = f"{'LoRA' if lora else 'full'}, {variant}"
            if run.fits(what, 0 if run.dry else 10):
                with run.attempt(what):
                    step = measure(run, task, variant, steps)
                    run.row(
                        what,
                        size=size,
                        batch=batch,
                        precision=task.precision,
                        images_per_second=round(batch / step, 2),
                        step_seconds=float(f"{step:.4g}"),
                        peak_memory_gib=run.peak_memory(),
                    )


def measure(run: GpuRun, task: Task, variant: str, steps: int) -> float:
    """Seconds of a step after the first ones."""
    parts, warmup = trained(run, task), 1 if run.dry else WARMUP
    if variant == VARIANTS[0]:
        return statistics.median(script(parts, task, warmup + steps)[warmup:])
    span = Span(run, warmup, warmup + steps)
    cache = [LatentCache(task.work / "cache", "all")] if "cache" in variant else []
    train_ours(make_module(parts), task, warmup + steps, [span, *cache])
    start, end = span.times
    return (end - start) / steps


def trained(run: GpuRun, task: Task) -> Components:
    """The model, ready to be trained."""
    parts = run.model("float32")
    prepare_unet(parts.unet, task.lora)
    run.empty_memory()
    return parts
