"""Stop at, or skip, a step whose loss is NaN or inf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from sdmodule.errors import SettingsError, check_choice

STOP, SKIP = CHOICES = ("stop", "skip")

MAX_SKIPPED_IN_A_ROW = 50
"""Consecutive skipped steps after which a training is given up."""


class NonFiniteLoss(Callback):
    """Stop before a loss of NaN or inf reaches the weights, or skip its step and count it.

    All devices do the same: a step counts as non-finite if the loss is on any device, or in any accumulated batch.

    Args:
        nan_loss: ``stop``, or ``skip``, which leaves the weights as they are and logs the count as ``train/skipped``.

    Raises:
        SettingsError: for another value; in training, for a non-finite loss with ``stop``, and after 50 consecutive
            ones with ``skip``.
    """

    def __init__(self, nan_loss: str = STOP) -> None:
        check_choice("trainer.nan_loss", nan_loss, CHOICES)
        self.nan_loss = nan_loss
        self.skipped = 0
        self._in_a_row = 0
        self._non_finite: Tensor | None = None  # so far in this step; on the device, so that no batch waits for it

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        non_finite = ~torch.isfinite(loss.detach())
        self._non_finite = non_finite if self._non_finite is None else self._non_finite | non_finite

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        non_finite = trainer.strategy.reduce_boolean_decision(bool(self._non_finite), all=False)
        self._non_finite = None
        if not non_finite:
            self._in_a_row = 0
            return
        step = trainer.global_step + 1
        advice = "lower model.optimizer.lr, use trainer.precision=32-true, or check the images"
        if self.nan_loss == STOP:
            raise SettingsError(
                f"loss is NaN or inf at step {step}; {advice}, or skip such steps with trainer.nan_loss=skip."
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise SettingsError(f"loss is NaN or inf at {MAX_SKIPPED_IN_A_ROW} steps in a row, up to {step}; {advice}.")
        optimizer.zero_grad()  # without gradients the optimizer changes neither weights nor its state
        rank_zero_warn(f"loss is NaN or inf at step {step}; step skipped, {self.skipped} so far.")
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics({"train/skipped": self.skipped}, step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
