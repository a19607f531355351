"""The precision that a model can be trained in."""

from __future__ import annotations

from lightning import Trainer

from sdmodule.errors import SettingsError


def check_training_precision(trainer: Trainer | None) -> None:
    """Check that a trainer keeps weights and images in float32.

    Raises:
        SettingsError: if it does not.
    """
    precision = "" if trainer is None else str(trainer.precision)
    if precision.endswith("-true") and precision != "32-true":
        raise SettingsError(
            f"trainer.precision={precision}: is for sampling only; train with 32-true, bf16-mixed, 16-mixed or auto."
        )
