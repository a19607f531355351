"""Training without the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def fit(
    module: LightningModule,
    data: LightningDataModule,
    steps: int,
    *callbacks: Callback,
    resume: Path | None = None,
    **settings: Any,
) -> Trainer:
    """Train in this process on the CPU; only callbacks write files."""
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoints,
        **settings,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer
