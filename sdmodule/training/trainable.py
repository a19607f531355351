"""What the modules share: optimizer, checkpoints of trained weights alone, names of validation metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from typing_extensions import override

from sdmodule.training.checkpoint_io import check_weights
from sdmodule.training.optimizers import Optimization, name_optimizers
from sdmodule.training.precision import check_training_precision


class TrainableModule(LightningModule):
    """A module whose checkpoints hold its trainable weights, and nothing that a pretrained checkpoint holds already.

    Attributes:
        optimization: the optimizer and its schedule; set by the constructor of a subclass.
        val_log_suffix: end of the names of validation metrics; see `validation_logged_with`.
    """

    optimization: Optimization
    val_log_suffix = ""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    @property
    def parameter_groups(self) -> list[Any]:
        """The trainable weights, in groups for the optimizer."""
        return list(trainable_parameters(self).values())

    def check_fit(self) -> None:
        """Check the optimizer and the trainer's precision, before anything is written.

        Raises:
            SettingsError: if they cannot train this module.
        """
        check_training_precision(self._trainer)
        self.optimization.check(self.parameter_groups, self._trainer.max_steps if self._trainer else None)

    @override
    def configure_optimizers(self) -> Any:
        return self.optimization.configure(self.parameter_groups, str(self._trainer.precision) if self._trainer else "")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = trainable_parameters(self)
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in trained}
        name_optimizers(checkpoint, self._trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_weights(checkpoint["state_dict"], self)
        self.optimization.check_state(checkpoint, self.parameter_groups, self._trainer)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = super().load_state_dict(state_dict, strict, assign)
        trained = trainable_parameters(self)
        found.missing_keys[:] = [name for name in found.missing_keys if name in trained]  # Lightning reports all others
        return found

    @override
    def on_validation_start(self) -> None:
        # to compile for validation's shapes too takes longer than to validate
        torch.compiler.set_stance("force_eager")

    @override
    def on_validation_end(self) -> None:
        torch.compiler.set_stance("default")

    def log_validation(self, metrics: Mapping[str, Tensor], main: str, batch_size: int) -> None:
        """Log metrics of a validation batch as ``val/<name>``; the ``main`` one is shown in the progress bar."""
        for name, value in metrics.items():
            shown = name == main and not self.val_log_suffix
            self.log(f"val/{name}{self.val_log_suffix}", value, prog_bar=shown, sync_dist=True, batch_size=batch_size)

    def validation_logged_with(self, suffix: str) -> AbstractContextManager[None]:
        """Log ``val/loss`` as ``val/loss<suffix>``, and other validation metrics likewise, inside a ``with`` block."""
        return replaced(self, "val_log_suffix", suffix)


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
