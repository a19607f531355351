"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from sdmodule.errors import SettingsError, check_int, check_number
from sdmodule.training.sharding import local, sharded_like
from sdmodule.training.trainable import TrainableModule, trainable_parameters


class EMA(Callback):
    """Keep an exponential moving average of the trainable weights; validate, sample and export with it.

    Each validation batch is also run with the raw weights: a module's ``val/loss`` is that of the average, and
    ``val/loss_raw`` that of the raw weights. Before ``start_step`` only ``val/loss`` is logged, for the raw weights.

    Only trainable weights are averaged and saved. The decay grows with the number of updates, ``(1 + n) / (10 + n)`` up
    to ``decay``, so that early averages forget the initial weights.

    Args:
        decay: share of the old average that an update keeps.
        start_step: first optimizer step that is averaged; before it the raw weights are used everywhere.

    Raises:
        SettingsError: for a value out of range.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 100) -> None:
        check_number("callbacks.ema.decay", decay, minimum=0, below=1)
        check_int("callbacks.ema.start_step", start_step, minimum=0)
        self.decay = decay
        self.start_step = start_step
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._step = 0
        self._raw: dict[str, Tensor] | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step  # only known now if the training resumes from a checkpoint
        weights = trainable_parameters(pl_module)
        self.average = {
            name: sharded_like(value, weights[name]).to(pl_module.device) for name, value in self.average.items()
        }

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or trainer.global_step < self.start_step:
            return
        self._step = trainer.global_step
        weights = trainable_parameters(pl_module)
        if not self.average:
            self.average = {name: value.detach().clone() for name, value in weights.items()}
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [local(self.average[name]) for name in weights]
        torch._foreach_lerp_(averages, [local(value.detach()) for value in weights.values()], 1.0 - decay)

    @contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """Use the average in place of the raw weights inside the block."""
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    def _swap_in(self, module: LightningModule) -> None:
        if not self.average or self._raw is not None:
            return
        self._raw = {}
        for name, value in trainable_parameters(module).items():
            average = self.average[name]
            if owns_memory(value) and value.stride() == average.stride():
                self._raw[name], value.data = value.data, average  # nothing is copied
            else:
                self._raw[name] = value.detach().clone()
                local(value.data).copy_(local(average))

    def _swap_out(self, module: LightningModule) -> None:
        if self._raw is None:
            return
        for name, value in trainable_parameters(module).items():
            if name not in self._raw:  # a signal came before it was swapped in
                continue
            if owns_memory(value) and value.data_ptr() == self.average[name].data_ptr():
                value.data = self._raw[name]
            else:
                local(value.data).copy_(local(self._raw[name]))
        self._raw = None

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)  # not in on_validation_start, where a checkpoint may be saved

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._raw is None or trainer.sanity_checking or not isinstance(pl_module, TrainableModule):
            return
        self._swap_out(pl_module)
        try:
            with pl_module.validation_logged_with("_raw"):
                trainer.strategy.validation_step(batch, batch_idx)  # the strategy applies precision and devices
        finally:
            self._swap_in(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.average = dict(state_dict["average"])
        self.updates = state_dict["updates"]


def owns_memory(weight: Tensor) -> bool:
    """Whether a weight is a tensor with memory of its own: strategies that shard a model keep views or parts of it."""
    data = weight.data
    return type(data) is Tensor and data.untyped_storage().nbytes() == data.nbytes


def load_average(module: LightningModule, checkpoint: str | Path) -> None:
    """Replace a module's trained weights with the average that a checkpoint holds.

    Args:
        module: a module with the settings of that training.
        checkpoint: a checkpoint file of a training with `EMA`.

    Raises:
        SettingsError: if the checkpoint holds no average, or one of other weights.
    """
    callbacks = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True).get("callbacks", {})
    average = callbacks.get(EMA.__qualname__, {}).get("average")
    weights = trainable_parameters(module)
    if not average or average.keys() != weights.keys():
        raise SettingsError(
            f"{checkpoint}: holds no average of the weights that this module trains; give a checkpoint of its own "
            "training, from after callbacks.ema.start_step."
        )
    for name, value in weights.items():
        value.data.copy_(average[name])
