"""Checkpoints as files: written aside, checked when they are read."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from typing_extensions import override

from sdmodule.atomic import whole_file
from sdmodule.errors import SettingsError


class WholeCheckpoints(TorchCheckpointIO):
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
            with whole_file(path) as aside:
                torch.save(checkpoint, aside)
        except (OSError, RuntimeError) as error:  # torch's own writer tells of a full disk by a RuntimeError
            reason = getattr(error, "strerror", None) or "is the disk full?"
            raise SettingsError(
                f"the checkpoint {path} cannot be written ({reason}); make room, then go on from the last whole "
                "one with ckpt_path=last."
            ) from error


def is_whole(file: Path) -> bool:
    """Whether a checkpoint is complete: a zip archive with an index, each of whose entries has its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # what is wrong with an archive comes in many kinds
        return False


def read_head(file: Path) -> dict[str, Any]:
    """A checkpoint as data alone, its tensors left on the disk.

    Raises:
        SettingsError: if it is broken, or is none of a training run.
    """
    try:
        if not is_whole(file):
            raise ValueError("its checksums do not hold")
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(checkpoint["global_step"], int) or not isinstance(checkpoint["state_dict"], dict):
            raise ValueError("it has no step and weights")
    except Exception as error:  # zip, pickle, key
        raise SettingsError(
            f"ckpt_path={file} is no whole checkpoint of a training run; give one that is, or ckpt_path=last."
        ) from error
    return checkpoint
