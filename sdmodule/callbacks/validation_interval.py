"""Validations counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override


class ValidationInterval(Callback):
    """Validate after every so many optimizer steps, over all epochs.

    Lightning counts batches, of which a step at the end of an epoch may have fewer than another: so it is told after
    each batch whether this is one to validate behind. A checkpoint keeps that, for a training that goes on with another
    interval.

    Args:
        steps: optimizer steps between validations.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.reached = False
        self._step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._tell(trainer, self.reached)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        if stepped:
            self._step = trainer.global_step
            self.reached = trainer.enable_validation and self._step % self.steps == 0
        self._tell(trainer, stepped and self.reached)

    @staticmethod
    def _tell(trainer: Trainer, now: bool) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # Lightning counts those of the epoch, unless it is told to look at no epoch's end
        batches = (progress.total if trainer.check_val_every_n_epoch is None else progress.current).ready
        trainer.val_check_batch = batches if now else batches + 1  # Lightning validates after multiples of it

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.reached = state_dict["reached"]
