"""Section ``syncs`` of ``benchmarks/gpu.py``: no step waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback
from torch import Tensor

from benchmarks.gpu_run import GpuRun
from benchmarks.training_peers import Task, make_data, make_module, prepare_unet, write_images
from sdmodule.cli.trainer import make_trainer

SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "tome=exact": {"tome": {"ratio": 0.5}},
    "tome=window": {"tome": {"ratio": 0.5, "engine": "window"}},
    "DeepCache": {"speed": {"cache_every": 2}},
    "guidance interval": {"speed": {"guidance_interval": [0.2, 0.8]}},
}

STEPS = 5
"""Steps in which a synchronisation is an error; one more before them may compile, tune and upload."""


def syncs(run: GpuRun) -> None:
    """Five steps of sampling and of training under ``torch.cuda.set_sync_debug_mode("error")``."""
    module = make_module(run.model("float32" if run.dry else "float16"))

    def watched(step: int, latents: Tensor) -> None:
        watch(run, 1 <= step <= STEPS)

    for name, settings in SAMPLING.items():
        if not run.fits(f"sampling, {name}", 2):
            return
        with run.attempt(f"sampling, {name}"):
            try:
                module.infer(
                    "", num_inference_steps=STEPS + 1, callback_on_step_end=watched, show_progress=False, **settings
                )
            finally:
                watch(run, False)
            run.row(f"sampling, {name}", passed=True)
    if run.fits("training", 10):
        with run.attempt("training"):
            train(run)
            run.row("training", passed=True)


def watch(run: GpuRun, on: bool) -> None:
    """Make synchronisations errors, or let them be."""
    if not run.dry:
        torch.cuda.set_sync_debug_mode("error" if on else "default")


class Watch(Callback):
    """Watches the training steps after the first."""

    def __init__(self, run: GpuRun) -> None:
        self.run = run

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to watch."""
        watch(self.run, trainer.global_step > 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop watching."""
        watch(self.run, False)


def train(run: GpuRun) -> None:
    """Train for one step and five more that are watched."""
    steps, size = (2, 64) if run.dry else (STEPS + 1, 256)
    task = Task(run.folder / f"images-{size}", size, 2, False, "32-true" if run.dry else "bf16-mixed", run.folder)
    parts = run.model("float32")
    prepare_unet(parts.unet, task.lora)
    write_images(task.folder, 2 * steps, size, ["a star"])
    settings = {"max_steps": steps, "val_check_interval": steps, "limit_val_batches": 0, "logger": False}
    trainer = make_trainer(
        run.trainer,
        precision=task.precision,
        callbacks=[Watch(run)],
        default_root_dir=run.folder,
        **settings,  # type: ignore[arg-type]
    )
    try:
        trainer.fit(make_module(parts), make_data(task))
    finally:
        watch(run, False)
