"""How long a predict run took, stage by stage."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from sdmodule.callbacks.prediction_writer import PredictionWriter
from sdmodule.samples import Samples


class TimingLogger(Callback):
    """Write ``timings.json``: seconds of text, denoise, decode and save, images a second and peak memory.

    The first batch pays for what is set up once, so it is reported apart, as ``warmup``; the figures of a run of one
    batch are that batch's.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.file = Path(output_dir) / "timings.json"

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches: list[dict[str, float]] = []
        self.images: list[int] = []
        self.start = time.perf_counter()

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
        self.batches.append(outputs.seconds)
        self.images.append(len(outputs.requests))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = time.perf_counter() - self.start
        if not trainer.is_global_zero:
            return
        skip = 1 if len(self.batches) > 1 else 0
        stages = {name: sum(batch[name] for batch in self.batches[skip:]) for name in self.batches[0]}
        images = sum(self.images[skip:])
        saved = [c.seconds for c in trainer.callbacks if isinstance(c, PredictionWriter)]  # type: ignore[attr-defined]
        timings = {
            "images": sum(self.images),
            "seconds": {**stages, "save": sum(saved)},
            "seconds_total": total,
            "images_per_second": images / sum(stages.values()),
            "warmup": {"images": self.images[0], "seconds": self.batches[0]} if skip else None,
            "peak_memory_bytes": peak_memory(pl_module.device),
            "device": str(pl_module.device),
        }
        self.file.write_text(json.dumps(timings, indent=2) + "\n")


def peak_memory(device: torch.device) -> int:
    """Most memory in use so far, in bytes: of the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
