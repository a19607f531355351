"""Section ``training`` of ``benchmarks/gpu.py``: full fine-tuning and LoRA beside the loop of diffusers' scripts."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.gpu_run import GpuRun
from benchmarks.training_peers import Task, make_module, ours, prepare_unet, script, write_images

WARMUP = 3
"""First steps of each, which are not counted."""


def training(run: GpuRun) -> None:
    """Images per second at 512 pixels: diffusers' loop, ours, and ours with latents and text cached."""
    size, batch, steps = (64, 2, 1) if run.dry else (512, 8, 12)
    folder = run.folder / f"training-{size}"
    write_images(folder, 2 * batch, size, ["a red circle", "a star"])
    for lora in (False, True):
        task = Task(folder, size, batch, lora, "32-true" if run.dry else "bf16-mixed", run.folder)
        kind = "LoRA" if lora else "full"
        variants: dict[str, Callable[[int], list[float]]] = {
            "diffusers' script": lambda count, task=task: script(trained(run, task), task, count),  # type: ignore[misc]
            "ours": lambda count, task=task: ours(make_module(trained(run, task)), task, count, cache="none"),  # type: ignore[misc]
            "ours, cache=all": lambda count, task=task: ours(make_module(trained(run, task)), task, count),  # type: ignore[misc]
        }
        for name, measured in variants.items():
            what = f"{kind}, {name}"
            if run.fits(what, 0 if run.dry else 12):
                with run.attempt(what):
                    seconds = measured(WARMUP + steps if not run.dry else steps)
                    step = statistics.median(seconds[0 if run.dry else WARMUP :])
                    run.row(
                        what,
                        size=size,
                        batch=batch,
                        precision=task.precision,
                        images_per_second=round(batch / step, 2),
                        step_seconds=float(f"{step:.4g}"),
                        peak_memory_gib=run.peak_memory(),
                    )


def trained(run: GpuRun, task: Task):  # noqa: ANN201
    """The model, ready to be trained."""
    parts = run.model("float32")
    prepare_unet(parts.unet, task.lora)
    run.empty_memory()
    return parts
