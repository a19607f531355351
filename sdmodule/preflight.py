"""Whether model, data and callbacks can be trained together, asked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import Callback

from sdmodule.callbacks.cache import Cache
from sdmodule.errors import SettingsError
from sdmodule.requests import INPAINT


def check_together(model: Any, data: Any, callbacks: Sequence[Callback]) -> None:
    """Check what only several of them know; nothing is read but captions.

    Args:
        model: the module, set up.
        data: the data module, set up.
        callbacks: those of the trainer.

    Raises:
        SettingsError: if they cannot.
    """
    _check_masks(model, data)
    for callback in callbacks:
        if isinstance(callback, Cache):
            callback.check(data, model)


def _check_masks(model: Any, data: Any) -> None:
    """Whether all pictures have masks where the loss needs them, and all or none where they are repainted."""
    bare = getattr(data, "bare", [])
    if not bare:
        return
    cure = "name them in a column mask_file_name of its metadata"
    if getattr(model, "objective", None) and model.objective.masked:
        raise SettingsError(f"objective.masked=true and {bare[0].place} has no masks; {cure}.")
    if getattr(model, "task", None) == INPAINT and len(bare) < len(data.sources):
        raise SettingsError(
            f"model=inpaint and {bare[0].place} has no masks, which other sources have; {cure}, or give none, and "
            "masks are drawn."
        )
