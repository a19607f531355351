"""What a training and a sampling say when they end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from typing_extensions import override

from sdmodule.callbacks.export import Export
from sdmodule.callbacks.timing import TimingLogger
from sdmodule.cli.next_command import next_line
from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.errors import count_of

PROMPT = "a red circle on a blue background"
"""What to sample after a training without captions."""


class TrainingRecord(Callback):
    """What the summary of a training needs: its start, a caption, and the first and last validation metrics.

    Attributes:
        first: the first value of each metric that was validated, with its step.
        last: the last one.
    """

    def __init__(self) -> None:
        self.first: dict[str, tuple[int, float]] = {}
        self.last: dict[str, tuple[int, float]] = {}
        self.caption = ""
        self.start = time.perf_counter()
        self.start_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_step = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._note_caption(batch)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._note_caption(batch)

    def _note_caption(self, batch: Any) -> None:
        if not self.caption and isinstance(batch, Mapping):
            self.caption = next((" ".join(text.split()) for text in batch.get("caption", ()) if text), "")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/") and not name.startswith("val/loss_") and not name.endswith("_raw"):
                self.last[name] = (trainer.global_step, float(value))
                self.first.setdefault(name, self.last[name])

    def figures(self, trainer: Trainer) -> Iterator[str]:
        """Steps, time, pace and memory; then each metric at the first and at the last validation."""
        steps = trainer.global_step - self.start_step
        told = [f"Trained {count_of(steps, 'step')} in {clock(time.perf_counter() - self.start)}"]
        if steps and (timings := read_timings(trainer)):
            told.append(f"{short(timings['samples_per_second'])} images per second")
            told.append(f"peak memory {short(timings['peak_memory_bytes'] / 2**30)} GiB")
        yield ", ".join(told)
        for name, (step, value) in self.last.items():
            begun, before = self.first[name]
            values = [f"{before:.4g} {'before' if begun == 0 else f'at step {begun}'}"] if begun < step else []
            values.append(f"{value:.4g} {'after' if step == trainer.global_step else f'at step {step}'}")
            yield f"{name}: {', '.join(values)}"


def training_summary(cfg: DictConfig, trainer: Trainer, model: Any, data: Any, record: TrainingRecord) -> Iterator[str]:
    """The last lines of a training: figures, where its files are, and the command that uses the export."""
    yield from record.figures(trainer)
    export = next((c.folder for c in trainer.callbacks if isinstance(c, Export)), None)  # type: ignore[attr-defined]
    if export is None:
        yield f"Wrote {cfg.output_dir}"
        return
    yield f"Wrote {cfg.output_dir}; the export is {export}"
    yield next_line(cfg, model, data, export, escape_prompt(record.caption) or PROMPT)


def sampling_summary(trainer: Trainer, data: Any, output_dir: Path) -> Iterator[str]:
    """The last lines of a sampling: images, seconds per image, where the sheet and the page are."""
    left = sum(request.kept for request in data.requests) - len(data.done)
    told = [f"Sampled {count_of(left, 'image')}"]
    if left and (timings := read_timings(trainer)):
        told.append(f"{short(1 / timings['images_per_second'])} seconds per image")
    yield ", ".join(told)
    written = [str(file) for name in ("grid.png", "index.html") if (file := output_dir / name).is_file()]
    yield f"Wrote {' and '.join(written) or output_dir}"


def read_timings(trainer: Trainer) -> dict[str, Any]:
    """What the run has written to ``timings.json``; empty without that callback."""
    timing = next((c for c in trainer.callbacks if isinstance(c, TimingLogger)), None)  # type: ignore[attr-defined]
    return json.loads(timing.file.read_text()) if timing is not None and timing.file.is_file() else {}


def short(number: float) -> str:
    """A number in two digits, or in all that it has before the point."""
    return f"{number:.2g}" if number < 99.5 else f"{number:,.0f}"


def clock(seconds: float) -> str:
    """A time as ``5 seconds`` or ``12:30 minutes``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02} hours"
    return f"{minutes}:{seconds:02} minutes" if minutes else count_of(int(seconds), "second")
