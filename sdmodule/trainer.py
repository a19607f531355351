"""The Lightning trainer, with the machine checked first."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer

from sdmodule.errors import SettingsError


def make_trainer(accelerator: str = "cpu", **settings: Any) -> Trainer:
    """Build a trainer; ``settings`` are those of ``lightning.Trainer``.

    Validation intervals count steps, over epochs.

    Raises:
        SettingsError: for a GPU where there is none.
    """
    if accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise SettingsError("trainer=gpu needs a GPU and torch sees none on this machine; use trainer=cpu.")
    return Trainer(
        accelerator=accelerator,
        check_val_every_n_epoch=None,
        enable_progress_bar=any(type(c).__name__ == "ProgressBar" for c in settings.get("callbacks", ())),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
