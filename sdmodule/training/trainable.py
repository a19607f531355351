"""What the modules share: optimizer, checkpoints of trained weights alone, names of validation metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from sdmodule.errors import SettingsError
from sdmodule.training.accumulation import GradientMean
from sdmodule.training.batch import SMALL, read_batch
from sdmodule.training.checkpoint_io import check_weights
from sdmodule.training.host_copy import mean_over_devices
from sdmodule.training.optimizers import Optimization, name_optimizers
from sdmodule.training.precision import allows_fused, check_training_precision
from sdmodule.training.sharded_strategy import FullyShardedStrategy
from sdmodule.training.validation import without_repeats

TRAINED_COUNT = "trained_weights"
"""Where a checkpoint holds how many weights it has."""


class TrainableModule(LightningModule):
    """A module whose checkpoints hold its trainable weights, and nothing that a pretrained checkpoint holds already.

    Attributes:
        optimization: the optimizer and its schedule; set by the constructor of a subclass.
        needs_captions: whether the batches of its data must hold captions.
        val_log_suffix: end of the names of validation metrics; see `validation_logged_with`.
    """

    optimization: Optimization
    needs_captions = True
    val_log_suffix = ""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self._gradient_mean = GradientMean()
        self.switched = ExitStack()  # what is switched for a whole run of the trainer
        self._eager = ExitStack()  # open in validation

    @property
    def parameter_groups(self) -> list[Any]:
        """The trainable weights, in groups for the optimizer."""
        return list(trainable_parameters(self).values())

    def check_fit(self) -> None:
        """Check the optimizer, the trainer's precision and its callbacks, before anything is written.

        Raises:
            SettingsError: if they cannot train this module.
        """
        check_training_precision(self._trainer)
        for callback in self._trainer.callbacks if self._trainer else ():  # type: ignore[attr-defined]
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                raise SettingsError(
                    f"{type(callback).__name__}: cannot be resumed from checkpoints that hold the trained weights "
                    "alone; use sdmodule.callbacks.EMA."
                )
        self.optimization.check(self.parameter_groups, self._trainer.max_steps if self._trainer else None)
        if (strategy := self._sharding) is not None:
            own: Any = self  # of a subclass
            strategy.check(own.parts, self.optimization.make(self.parameter_groups), own.training_settings.compile)

    @property
    def _sharding(self) -> FullyShardedStrategy | None:
        strategy = self._trainer.strategy if self._trainer is not None else None
        return strategy if isinstance(strategy, FullyShardedStrategy) else None

    @override
    def configure_model(self) -> None:
        if (strategy := self._sharding) is not None:
            strategy.shard(self.parts)  # type: ignore[arg-type]  # of a subclass

    @override
    def configure_optimizers(self) -> Any:
        return self.optimization.configure(self.parameter_groups, fused=allows_fused(self._trainer))

    def validation_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> tuple[dict[str, Any], int]:
        """A batch as a mapping, without repeated examples, and how many it counts; see `without_repeats`."""
        return without_repeats(self.read_batch(batch, batch_idx), batch_idx, self._trainer, dataloader_idx)

    def weighted(self, loss: Tensor, images: int) -> Tensor:
        """The loss of a training batch, to be returned by ``training_step``: weighted by its images in the step."""
        return self._gradient_mean.weigh(loss, images, self._trainer)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._gradient_mean.rescale(self.parameters(), self.trainer)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = trainable_parameters(self)
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in trained}
        checkpoint[TRAINED_COUNT] = len(checkpoint["state_dict"])
        name_optimizers(checkpoint, self._trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        complete = len(checkpoint["state_dict"]) == checkpoint.get(TRAINED_COUNT)
        check_weights(checkpoint["state_dict"], self, whole=fitting or not complete)
        if type(self).configure_optimizers is TrainableModule.configure_optimizers:  # of another, Lightning knows more
            self.optimization.check_state(checkpoint, self.parameter_groups, self._trainer)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = super().load_state_dict(state_dict, strict, assign)
        trained = trainable_parameters(self)
        found.missing_keys[:] = [name for name in found.missing_keys if name in trained]  # Lightning reports all others
        return found

    def read_batch(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """A batch as a mapping that holds what it must; see `training.batch.read_batch`.

        On a GPU, whose values would have to be waited for, they are not looked at: they were on the way there.
        """
        return read_batch(batch, self.needs_captions, values=self.device.type == "cpu")

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        own = type(self).training_step.__module__.startswith(__name__.partition(".")[0])  # others take other batches
        if device.type == "cpu" or self.trainer.predicting or not own:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        batch = read_batch(batch, self.needs_captions)
        small = {name: batch.pop(name) for name in SMALL if name in batch}
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **small}

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The metrics of validation, as ``test/<name>``."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    @override
    def on_test_start(self) -> None:
        self.on_validation_start()

    @override
    def on_test_end(self) -> None:
        self.on_validation_end()

    @override
    def on_validation_start(self) -> None:
        # to compile for validation's shapes too takes longer than to validate
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))

    @override
    def on_validation_end(self) -> None:
        self._eager.close()

    @override
    def on_fit_end(self) -> None:
        self.restore()

    @override
    def on_predict_end(self) -> None:
        self.restore()

    @override
    def configure_callbacks(self) -> list[Callback]:
        return [RestoreAfterException()]

    def restore(self) -> None:
        """Undo what was switched for a run of the trainer, however it ended."""
        self._eager.close()
        self.switched.close()

    def log_training(self, name: str, value: Tensor) -> None:
        """Log a number of a training batch as ``train/<name>``, its mean over devices."""
        bar = None
        if self._trainer is not None:
            value, bar = mean_over_devices(value.detach(), self._trainer), self._trainer.progress_bar_callback
        # for a bar of its own, Lightning waits for the number in each step
        self.log(f"train/{name}", value, prog_bar=bar is not None and getattr(bar, "waits_for_metrics", True))

    def log_validation(self, metrics: Mapping[str, Tensor], main: str, batch_size: int) -> None:
        """Log metrics of a validation batch as ``val/<name>``; the ``main`` one is shown in the progress bar."""
        stage = "test" if self.trainer.testing else "val"
        if self.trainer.world_size > 1:
            metrics, batch_size = self._over_devices(metrics, batch_size)
        for name, value in metrics.items():
            shown = name == main and not self.val_log_suffix
            self.log(
                f"{stage}/{name}{self.val_log_suffix}", value, prog_bar=shown, sync_dist=True, batch_size=batch_size
            )

    def _over_devices(self, metrics: Mapping[str, Tensor], batch_size: int) -> tuple[dict[str, Tensor], int]:
        """Means over the images of all devices, of which each may have another number, and that number.

        Lightning averages the numbers as integers, so it must find the same one everywhere.
        """
        own = [value.detach().float() * batch_size for value in metrics.values()]
        sums = torch.stack([*own, torch.tensor(float(batch_size), device=self.device)])
        *values, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return {name: value / count for name, value in zip(metrics, values, strict=True)}, round(float(count))

    def validation_logged_with(self, suffix: str) -> AbstractContextManager[None]:
        """Log ``val/loss`` as ``val/loss<suffix>``, and other validation metrics likewise, inside a ``with`` block."""
        return replaced(self, "val_log_suffix", suffix)


class RestoreAfterException(Callback):
    """Undo what a run had switched on a module if it ends early; Lightning calls no hook of the module then."""

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, TrainableModule):
            pl_module.restore()


def trainable_parameters(module: LightningModule) -> dict[str, Any]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside a ``with`` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
