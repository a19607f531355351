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
from sdmodule.training.host_copy import HostCopy, any_device
from sdmodule.training.precision import updates_on_device

STOP, SKIP = CHOICES = ("stop", "skip")

MAX_SKIPPED_IN_A_ROW = 50
"""Consecutive skipped steps after which a training is given up."""


class NonFiniteLoss(Callback):
    """Keep a loss of NaN or inf from the weights: stop, or skip its step and count it.

    All devices do the same: a step counts as non-finite if the loss is on any device, or in any accumulated batch.

    On a GPU, to look at the loss is to wait for it. A fused optimizer is told on the device to leave out such a step,
    with weights and state as they were, and the host looks one step later; before a validation, a checkpoint and the
    end it waits. With another optimizer it waits in each step, for the forward pass.

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
        self._non_finite: Tensor | None = None  # so far in this step, on the device
        self._copy: HostCopy | None = None  # of that, over all devices
        self._pending: tuple[Trainer, int, HostCopy] | None = None  # of a step that the optimizer has seen

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        non_finite = ~torch.isfinite(loss.detach())
        self._non_finite = non_finite if self._non_finite is None else self._non_finite | non_finite
        if loss.device.type == "cuda":  # the copy comes before the backward pass, which nobody waits for then
            self._non_finite = any_device(self._non_finite, trainer) > 0
            self._copy = HostCopy(self._non_finite)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._look_back()
        step, non_finite, copy = trainer.global_step + 1, self._non_finite, self._copy
        self._non_finite = self._copy = None
        if non_finite is not None and copy is not None and updates_on_device(optimizer):
            optimizer.found_inf = non_finite.float()  # type: ignore[attr-defined]
            self._pending = (trainer, step, copy)
            return
        found = bool(non_finite if copy is None else copy.read())
        if copy is None:
            found = trainer.strategy.reduce_boolean_decision(found, all=False)
        self._judge(found, step, trainer)
        if found:
            optimizer.zero_grad()  # without gradients the optimizer changes neither weights nor its state

    def _look_back(self) -> None:
        """Wait for the loss of the last step, and stop if it was not finite, or count it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            trainer, step, copy = pending
            self._judge(bool(copy.read()), step, trainer)

    def _judge(self, non_finite: bool, step: int, trainer: Trainer) -> None:
        """Raise, or count, if the loss of a step was not finite."""
        if not non_finite:
            self._in_a_row = 0
            return
        advice = "lower model.optimizer.lr, use trainer.precision=32-true, or check the images"
        if self.nan_loss == STOP:
            raise SettingsError(
                f"loss is NaN or inf at step {step}; {advice}, or skip such steps with trainer.nan_loss=skip."
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise SettingsError(f"loss is NaN or inf at {MAX_SKIPPED_IN_A_ROW} steps in a row, up to {step}; {advice}.")
        rank_zero_warn(f"loss is NaN or inf at step {step}; step skipped, {self.skipped} so far.")
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics({"train/skipped": self.skipped}, step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_back()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look_back()
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pending, self._pending = self._pending, None
        self._non_finite = self._copy = None
        if pending is not None and not isinstance(exception, Exception) and self.nan_loss == SKIP:
            self.skipped += bool(pending[2].read())  # interrupted: the checkpoint that follows has the count

    @override
    def state_dict(self) -> dict[str, Any]:
        self._look_back()  # before any checkpoint is written
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
