"""Which checkpoint a training goes on from, and whether it can."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.errors import SettingsError


def find_checkpoint(ckpt_path: str | None, output_dir: Path, max_steps: int) -> str | None:
    """The checkpoint to go on from.

    Args:
        ckpt_path: a file, a folder of shards, or ``last`` for the newest whole one in ``output_dir/checkpoints``;
            None starts anew.
        output_dir: folder of the run.
        max_steps: step at which the training ends.

    Raises:
        SettingsError: if there is none, if it is broken, or if it leaves nothing to train.
    """
    if ckpt_path is None or Path(ckpt_path).is_dir():  # in shards: a folder, which only its own strategy can read
        return ckpt_path
    path = newest_whole(output_dir / "checkpoints") if ckpt_path == "last" else Path(ckpt_path).expanduser()
    if not path.is_file():
        raise SettingsError(f"ckpt_path={ckpt_path} was not found; give a .ckpt file of an earlier run.")
    try:
        step = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    except Exception as error:  # what is wrong with a file comes in many kinds: zip, pickle, key
        raise SettingsError(f"ckpt_path={ckpt_path} is no checkpoint of a training run; give one that is.") from error
    if step >= max_steps:
        raise SettingsError(
            f"ckpt_path={path} is of step {step} and trainer.max_steps={max_steps}, which leaves nothing to train; "
            "give a larger trainer.max_steps."
        )
    return str(path)


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint of a folder whose bytes are those that were written; broken ones are named and passed over.

    Raises:
        SettingsError: if there is none.
    """
    files = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)
    for file in files:
        if is_whole(file):
            return file
        rank_zero_warn(f"{file} is broken and is passed over.")
    broken = f"; the {len(files)} that are there are broken" if files else ""
    raise SettingsError(
        f"ckpt_path=last found no checkpoint in {folder}{broken}; give output_dir=… of a run that left one."
    )


def is_whole(file: Path) -> bool:
    """Whether a checkpoint is complete: a zip archive with an index, each of whose entries has its checksum."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
