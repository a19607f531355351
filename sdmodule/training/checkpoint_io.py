"""Checkpoints as files: written aside, checked when they are read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import nn
from typing_extensions import override

from sdmodule.errors import SettingsError
from sdmodule.io.atomic import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, each moved into place once it lies whole on the disk.

    Lightning writes into the folder for temporary files first and moves from there, which on another disk is a copy
    that a kill tears.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SettingsError: if it cannot be written; what was in its place stays there.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # into a file of Python's, which tells why it cannot be written
            with atomic_write(path) as aside, aside.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # the latter from torch, while it handles the former
            reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
            raise SettingsError(
                f"the checkpoint {path} cannot be written ({reason}); make room, then go on from the last whole one "
                "with ckpt_path=last."
            ) from error


def is_intact(file: Path) -> bool:
    """Whether a checkpoint is complete: a zip archive with an index, each of whose entries has its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # what is wrong with an archive comes in many kinds
        return False


PARTS = {"global_step": int, "state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list}
"""What a checkpoint of a training has, and of which type."""


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint as data alone, its tensors left on the disk.

    Raises:
        SettingsError: if it is broken, or is none of a training run.
    """
    try:
        if not is_intact(file):
            raise ValueError("its checksums do not hold")
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if wrong := [name for name, kind in PARTS.items() if not isinstance(checkpoint[name], kind)]:
            raise ValueError(f"{wrong} are of other types")
    except Exception as error:  # zip, pickle, key
        raise SettingsError(
            f"ckpt_path={file} is no whole checkpoint of a training run; give one that is, or ckpt_path=last."
        ) from error
    return checkpoint


def check_weights(held: Mapping[str, Any], module: nn.Module) -> None:
    """Check, before it is used, that a checkpoint has the weights that a module trains: these alone, in their shapes.

    Raises:
        SettingsError: if not.
    """
    wanted = {name: value.shape for name, value in module.named_parameters() if value.requires_grad}
    found = {name: getattr(value, "shape", None) for name, value in held.items()}
    differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if differing:
        raise SettingsError(
            f"the checkpoint's weights are not those that are trained here: {len(differing)} of {len(wanted)} are "
            f"missing, of another shape or unknown, such as {differing[0]}; give the settings that it was trained with."
        )
