"""What a single file holds that is no checkpoint in the original layout, for messages."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sdmodule.components.weights_file import Weights
from sdmodule.errors import SettingsError
from sdmodule.families.family import Family

ADAPTERS = {"lora": "a LoRA", "hada_w": "a LyCORIS adapter", "lokr_w": "a LyCORIS adapter"}

FOREIGN = {
    **ADAPTERS,
    "unet.down_blocks.": "a training checkpoint (sample from the export/ of the run instead)",
    "control_model.": "a ControlNet",
    "down_blocks.": "one component in the diffusers layout, which is read from its folder",
}
"""Parts of keys that only other kinds of files have; the error reports the first that matches."""


def adapter_kind(weights: Weights) -> str:
    """What kind of adapter a file holds, if it is one."""
    for mark, kind in ADAPTERS.items():
        if any(mark in key for key in weights):
            return kind
    word = next(iter(weights), ".")
    return "a learned word" if len(weights) == 1 and "." not in word and weights[word].ndim <= 2 else ""


def refuse_adapter(path: Path, weights: Weights) -> None:
    """Refuse an adapter in the place of a checkpoint.

    Raises:
        SettingsError: if the file is one.
    """
    if kind := adapter_kind(weights):
        raise SettingsError(
            f"{path}: is {kind}, no whole checkpoint; give adapters={path} beside the checkpoint it was trained on."
        )


def kind_of(keys: Collection[str], found: Collection[str], family: Family) -> str:
    """What a file holds.

    Args:
        keys: of the file.
        found: the networks that it has.
        family: which the file is of.
    """
    if kind := next((kind for mark, kind in FOREIGN.items() if any(mark in key for key in keys)), None):
        return kind
    if not found:
        return f"an unknown kind of file ({', '.join(sorted(keys)[:3]) or 'no weights'})"
    missing = [name for name in family.models if name not in found]
    return f"a checkpoint of {family.title}" + (f" without {' and '.join(missing)}" if missing else "")
