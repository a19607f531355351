"""Timings of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from sdmodule.callbacks.model_flops import CallRecorder
from sdmodule.callbacks.peak_flops import peak_flops
from sdmodule.callbacks.prediction_writer import PredictionWriter
from sdmodule.callbacks.timing_figures import (
    batch_length,
    flatten,
    median_and_p95,
    on_all_devices,
    peak_memory,
    reset_peak_memory,
    slowest,
)
from sdmodule.errors import check_bool, check_int, check_number
from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.run_folder import TIMINGS
from sdmodule.sampling.result import Samples

WINDOW = 200
"""Number of recent training steps that logged figures describe."""


@dataclass
class StepTime:
    """Seconds of a training step, those of them that were spent waiting for data, and its images."""

    seconds: float = 0.0
    waiting: float = 0.0
    images: int = 0


class TimingLogger(Callback):
    """Write ``timings.json`` and log its figures.

    Sampling: seconds of each stage (text, denoise, decode, save) and of each denoising step, and images per second.
    Training: samples per second, seconds per step, and the share of time spent waiting for data. Both: peak memory and,
    if the device's peak FLOPS are known, model FLOPs utilization (MFU, Chowdhery et al. 2022, appendix B): the share of
    the peak that the model's own operations make up. What token merging, feature caching or cached text leaves out
    counts as done. A UNet that is compiled as a whole is not counted.

    A step is one of the optimizer, with all batches that are accumulated for it. With several devices, images, images
    per second and MFU are those of all together, and times and peak memory those of the device that has the most.

    Warm-up, which includes compilation, is reported separately: the first batch of sampling, unless it is the only
    one, and the first steps of training.

    Args:
        output_dir: folder of the run.
        warmup_steps: training steps that count as warm-up.
        synchronize: wait for the device after every training step, so that the time of each step is exact, at the cost
            of some idle time; without it times are right on average.
        peak_flops: floating-point operations per second of the device; known for many GPUs if None.

    Raises:
        SettingsError: for a value out of range.
    """

    def __init__(
        self,
        output_dir: str | Path,
        warmup_steps: int = 3,
        synchronize: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        self.file = Path(output_dir) / TIMINGS
        check_int("callbacks.timing.warmup_steps", warmup_steps, minimum=0)
        check_bool("callbacks.timing.synchronize", synchronize)
        if peak_flops is not None:
            check_number("callbacks.timing.peak_flops", peak_flops, above=0)
        self.warmup_steps = warmup_steps
        self.synchronize = synchronize
        self.peak_flops = peak_flops
        self.flops: int | None = None
        self._recording = ExitStack()
        self._recorder: CallRecorder | None = None

    # ---------------------------------------------------------------------------------------------- training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reset_peak_memory(pl_module.device)
        self.steps: list[StepTime] = []
        self._step = StepTime()
        self._steps_done = trainer.global_step
        self._batch_start = self._batch_end = time.perf_counter()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_start = time.perf_counter()
        if len(self.steps) == 1 and not self._step.images:
            self._record_calls(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.synchronize and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self._step.seconds += now - self._batch_end
        self._step.waiting += self._batch_start - self._batch_end
        self._step.images += batch_length(batch)
        self._batch_end = now
        if trainer.global_step == self._steps_done:  # gradients are accumulated
            return
        self._steps_done = trainer.global_step
        if len(self.steps) == 1:
            self._count_flops()
            self._batch_end = time.perf_counter()
        self.steps.append(self._step)
        self._step = StepTime()
        if trainer.global_step % trainer.log_every_n_steps == 0 and len(self.steps) > self.warmup_steps:  # type: ignore[attr-defined]
            # not with self.log, whose bookkeeping takes a millisecond per figure
            figures = dict(flatten(self.training_figures(trainer, pl_module, WINDOW)))
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics({f"train/{name}": value for name, value in figures.items()}, trainer.global_step)
            self._batch_end = time.perf_counter()  # logging is not part of the step

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch_end = time.perf_counter()  # validation is not waiting for data

    def training_figures(self, trainer: Trainer, pl_module: LightningModule, last: int | None = None) -> dict[str, Any]:
        """Figures of the steps after warm-up, or of the ``last`` ones among them; all devices must ask for them.

        Devices wait for each other at every step, so times and memory are those of the one that has the most.
        """
        skip = self.warmup_steps if len(self.steps) > self.warmup_steps else 0
        steps = self.steps[max(skip, len(self.steps) - last) if last else skip :]
        seconds = sum(step.seconds for step in steps)
        own = {
            "images": sum(step.images for step in steps),
            "seconds": seconds,
            "step_seconds": median_and_p95([step.seconds for step in steps]),
            "data_wait": sum(step.waiting for step in steps) / seconds,
            "peak_memory": peak_memory(pl_module.device),
            "flops": self.flops,
        }
        devices = on_all_devices(own, trainer)
        figures: dict[str, Any] = {
            "samples_per_second": sum(one["images"] for one in devices) / max(one["seconds"] for one in devices),
            "step_seconds": max((one["step_seconds"] for one in devices), key=lambda times: times["median"]),
            "data_wait": max(one["data_wait"] for one in devices),
            "peak_memory_gib": max(one["peak_memory"] for one in devices) / 2**30,
        }
        peak = self._peak(trainer, pl_module)
        if peak and all(one["flops"] for one in devices):
            done = len(steps) * sum(one["flops"] for one in devices)
            figures["mfu"] = done / max(one["seconds"] for one in devices) / peak / len(devices)
        return figures

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.steps:
            return
        figures = self.training_figures(trainer, pl_module)
        warmup = self.steps[: self.warmup_steps] if len(self.steps) > self.warmup_steps else []
        timings = {
            "steps": len(self.steps),
            **figures,
            "warmup": {"steps": len(warmup), "seconds": sum(step.seconds for step in warmup)} if warmup else None,
            "peak_memory_bytes": round(figures["peak_memory_gib"] * 2**30),
            "device": str(pl_module.device),
            "devices": trainer.world_size,
        }
        if trainer.is_global_zero:
            self._write(timings)

    # ---------------------------------------------------------------------------------------------- sampling

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches: list[Any] = []  # seconds of each stage, not read before the end
        self.denoising: list[Any] = []
        self.images: list[int] = []
        reset_peak_memory(pl_module.device)
        self._predict_start = time.perf_counter()

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._record_calls(trainer, pl_module)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Samples,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._recording.close()
        self.batches.append(outputs.seconds)
        self.denoising.append(outputs.step_seconds)
        self.images.append(len(outputs.requests))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        devices = on_all_devices(self._own_figures(trainer, pl_module), trainer)
        if not trainer.is_global_zero or not self.batches:
            return
        rate = sum(one["rate"] for one in devices)
        timings: dict[str, Any] = {
            "images": sum(one["images"] for one in devices),
            "seconds": slowest([one["seconds"] for one in devices]),
            "seconds_total": max(one["total"] for one in devices),
            "step_seconds": slowest([one["step_seconds"] for one in devices]),
            "images_per_second": rate,
            "warmup": {
                "images": sum(one["warmup_images"] for one in devices),
                "seconds": slowest([one["warmup_seconds"] for one in devices]),
            }
            if len(self.batches) > 1
            else None,
            "peak_memory_bytes": max(one["peak_memory"] for one in devices),
            "device": str(pl_module.device),
            "devices": trainer.world_size,
        }
        peak = self._peak(trainer, pl_module)
        self._count_flops()
        if peak and self.flops:
            self.flops //= self.images[0]
            timings |= {"flops_per_image": self.flops, "mfu": self.flops * rate / peak / trainer.world_size}
        self._write(timings)
        names = ("seconds", "step_seconds", "images_per_second", "mfu")
        logged = {name: timings[name] for name in names if name in timings}
        for logger in trainer.loggers:
            logger.log_metrics({f"predict/{name}": value for name, value in flatten(logged)})
            logger.save()

    def _own_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What this device has sampled, and in what time."""
        skip = 1 if len(self.batches) > 1 else 0
        stages = (
            {name: sum(batch[name] for batch in self.batches[skip:]) for name in self.batches[0]}
            if self.batches
            else {}
        )
        saved = [c.seconds for c in trainer.callbacks if isinstance(c, PredictionWriter)]  # type: ignore[attr-defined]
        return {
            "images": sum(self.images),
            "rate": sum(self.images[skip:]) / sum(stages.values()) if stages else 0.0,
            "peak_memory": peak_memory(pl_module.device),
            "seconds": {**stages, "save": sum(saved)} if stages else {},
            "total": time.perf_counter() - self._predict_start,  # stages are read above, once the device is done
            "step_seconds": median_and_p95([step for steps in self.denoising[skip:] for step in steps]),
            "warmup_images": self.images[0] if skip else 0,
            "warmup_seconds": dict(self.batches[0]) if skip else {},
        }

    # ---------------------------------------------------------------------------------------------- both

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._recording.close()

    def _record_calls(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the calls of the model from here on, if the device's peak is known."""
        if self._peak(trainer, pl_module):
            self._recorder = self._recording.enter_context(CallRecorder(pl_module))

    def _count_flops(self) -> None:
        """Count the operations of the calls that were noted."""
        self._recording.close()
        self.flops = None if self._recorder is None else self._recorder.flops()

    def _peak(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Peak floating-point operations per second of the device; None or 0 if unknown."""
        if self.peak_flops is None and pl_module.device.type == "cuda":
            self.peak_flops = peak_flops(pl_module.device, str(trainer.precision)) or 0.0
        return self.peak_flops

    def _write(self, timings: Mapping[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.file, json.dumps(timings, indent=2) + "\n")
