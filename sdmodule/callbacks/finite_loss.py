"""What becomes of a step whose loss is no number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from sdmodule.errors import SettingsError

STOP, SKIP = CHOICES = ("stop", "skip")

IN_A_ROW = 50
"""Skipped steps after which a training is taken for lost."""


class NonFiniteLoss(Callback):
    """Stop before a loss of NaN or infinity reaches the weights, or leave its step out and count it.

    All devices do the same: a step is bad if its loss is bad on one of them, or in one of its accumulated batches.

    Args:
        nan_loss: ``stop``, or ``skip``: the weights stay as they are, and ``train/skipped`` tells how often.

    Raises:
        SettingsError: for another value; in training, when it is to stop, or has skipped 50 steps in a row.
    """

    def __init__(self, nan_loss: str = STOP) -> None:
        if nan_loss not in CHOICES:
            raise SettingsError(f"trainer.nan_loss={nan_loss} is not known; give {STOP} or {SKIP}.")
        self.nan_loss = nan_loss
        self.skipped = 0
        self._in_a_row = 0
        self._bad: Tensor | None = None

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        bad = trainer.strategy.reduce_boolean_decision(bool(self._bad), all=False)
        self._bad = None
        if not bad:
            self._in_a_row = 0
            return
        step = trainer.global_step + 1
        advice = "lower model.optimizer.lr, use trainer.precision=32-true, or look at the images"
        if self.nan_loss == STOP:
            raise SettingsError(
                f"the loss of step {step} is no number; {advice}, or leave such steps out with trainer.nan_loss=skip."
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row == IN_A_ROW:
            raise SettingsError(f"the losses of {IN_A_ROW} steps up to step {step} are no numbers; {advice}.")
        optimizer.zero_grad()  # without gradients no weight and no moment is changed
        rank_zero_warn(f"The loss of step {step} is no number; the step is skipped, {self.skipped} in all.")
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics({"train/skipped": self.skipped}, step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
