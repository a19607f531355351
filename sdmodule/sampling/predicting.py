"""How a model is held during ``Trainer.predict``: the speed settings applied, and in the host's memory if offloaded."""

from __future__ import annotations

import math
from collections.abc import Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sdmodule.components.checkpoint import Components
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.stages import work_ahead
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.offload import groups_of, kept_on_host


def awaiting_use(parts: Components, settings: SamplingSettings) -> AbstractContextManager[None]:
    """Keep the trainer from moving a whole model to a GPU that it may not fit, if ``speed.offload`` is set."""
    if settings.speed.offload == "none":
        return nullcontext()
    return kept_on_host([network for group in groups_of(parts) for network in group])


def sped_up(
    parts: Components, settings: SamplingSettings, trainer: Any, device: torch.device
) -> AbstractContextManager[None]:
    """Apply the speed settings for all images that a trainer is to predict."""
    images = images_ahead(trainer.predict_dataloaders)
    return apply_speed(parts, settings.speed, work_ahead(parts, settings, images), device)


def images_ahead(loader: Any) -> float:
    """Images that a data loader of prediction asks for, those that fill batches up too; inf if it does not say."""
    data: Any = getattr(loader, "dataset", None)
    if hasattr(data, "batches"):
        return sum(len(batch) for batch in data.batches)
    return len(data) if isinstance(data, Sized) else math.inf
