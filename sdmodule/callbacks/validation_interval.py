"""Validations counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from sdmodule.training.loop_state import schedule_validation


class ValidationInterval(Callback):
    """Validate every ``steps`` optimizer steps, counted over all epochs.

    Lightning counts batches, and the last step of an epoch may have fewer than the others. So after each batch
    it is told whether to validate. Checkpoints keep the answer, for a training that resumes with another interval.

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
        schedule_validation(trainer, self.reached)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._step
        if stepped:
            self._step = trainer.global_step
            self.reached = trainer.enable_validation and self._step % self.steps == 0
        schedule_validation(trainer, stepped and self.reached)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.reached = state_dict["reached"]
