"""Callbacks for the reported faults: one that takes a file away in mid-training, one that ends a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Vanish(Callback):
    """Delete a file, or cut it in half, once ``step`` optimizer steps are done."""

    def __init__(self, file: str, step: int, cut: bool = False) -> None:
        self.file = Path(file)
        self.step = step
        self.cut = cut

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step >= self.step and self.file.is_file():
            content = self.file.read_bytes()
            self.file.unlink()
            if self.cut:
                self.file.write_bytes(content[: len(content) // 2])


class Captions(Callback):
    """Write down the captions of every training batch, with the number of steps that are done."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        with self.file.open("a") as lines:
            lines.write(f"{trainer.global_step} {' '.join(batch['caption'])}\n")


class FailAt(Callback):
    """Raise an error of a kind that nobody expects, once ``step`` optimizer steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("an unexpected failure")
