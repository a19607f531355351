"""Training checkpoints as files: written atomically, checked when read."""

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
from sdmodule.training.sharded_checkpoint import is_intact_folder, is_sharded, read_folder, read_index

ENTRIES = {"global_step": int, "state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list}
"""What a training checkpoint holds, with its types."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, each moved into place once it is complete on the disk.

    Lightning writes to the folder for temporary files and moves the file from there. To another disk that is a copy,
    which a kill leaves truncated.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SettingsError: if it cannot be written; an earlier file of that name stays as it was.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # through a file of Python's, whose errors say why it cannot be written
            over_folder = is_sharded(path)  # of a sharded training that this one resumes
            with atomic_write(path, over_folder) as aside, aside.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch raises the latter while it handles the former
            reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
            raise SettingsError(
                f"the checkpoint {path} cannot be written ({reason}); make room, then resume from the last intact one "
                "with ckpt_path=last."
            ) from error

    @override
    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint of whole or of sharded weights."""
        if is_sharded(path):
            return read_folder(Path(path))
        return super().load_checkpoint(path, *arguments, **options)


def is_intact(file: Path) -> bool:
    """Whether a checkpoint is complete: a zip archive with an index, whose entries match their checksums."""
    if file.is_dir():
        return is_intact_folder(file)
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive raises errors of many kinds
        return False


def open_checkpoint(file: str | Path) -> dict[str, Any]:
    """A checkpoint file as plain data, its tensors left on the disk."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint as plain data, its tensors left on the disk; sharded ones have no data.

    Raises:
        SettingsError: if it is corrupt or not a training checkpoint.
    """
    try:
        if not is_intact(file):
            raise ValueError("checksums do not match")
        checkpoint = read_index(file) if file.is_dir() else open_checkpoint(file)
        if wrong := [name for name, kind in ENTRIES.items() if not isinstance(checkpoint[name], kind)]:
            raise ValueError(f"wrong types: {wrong}")
    except Exception as error:  # of zip, pickle, a missing key
        raise SettingsError(
            f"ckpt_path={file}: is corrupt or not a training checkpoint; give another, or ckpt_path=last."
        ) from error
    return checkpoint


def check_weights(held: Mapping[str, Any], module: nn.Module, whole: bool = True) -> None:
    """Check, before it is used, that a checkpoint holds the weights a module trains, no others, in their shapes.

    Args:
        held: the checkpoint's weights.
        module: what they are loaded into.
        whole: all of the module's trainable weights must be there. Otherwise some may be missing: a training that had
            frozen them left them as the pretrained checkpoint has them.

    Raises:
        SettingsError: if it does not.
    """
    wanted = {name: value.shape for name, value in module.named_parameters() if value.requires_grad}
    found = {name: getattr(value, "shape", None) for name, value in held.items()}
    missing = sorted(wanted.keys() - found.keys()) if whole or not found else []
    unexpected = sorted(found.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names]
    if problems:
        raise SettingsError(
            f"the checkpoint's weights are not the {len(wanted)} that are trained here: {'; '.join(problems)}; give "
            "the settings that it was trained with."
        )
