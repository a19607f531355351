"""Resuming a training: which checkpoint, and whether it fits."""

from __future__ import annotations

import os
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from sdmodule.errors import SettingsError
from sdmodule.training.checkpoint_io import is_intact, open_checkpoint, read_checkpoint
from sdmodule.training.loop_state import resumes_validation, set_last_step
from sdmodule.training.sharded_checkpoint import is_sharded, read_index


def find_checkpoint(ckpt_path: str | None, output_dir: Path, max_steps: int, ended: bool = True) -> str | None:
    """The checkpoint to resume from; None to start a new training.

    Args:
        ckpt_path: a file, a folder of shards, or ``last`` for the newest intact one in ``output_dir/checkpoints``;
            ``auto`` is ``last`` where there is one; None starts a new training.
        output_dir: folder of the run.
        max_steps: step at which the training ends.
        ended: whether everything a training writes at its end exists, so that nothing is left to do after its last
            step.

    Raises:
        SettingsError: if there is none, if it is corrupt, or if it leaves nothing to train.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "auto":
        if not any(is_intact(file) for file in (output_dir / "checkpoints").glob("*.ckpt")):
            return None
        ckpt_path = "last"
    path = newest_intact(output_dir / "checkpoints") if ckpt_path == "last" else Path(ckpt_path).expanduser()
    if not os.path.isfile(path) and not is_sharded(path):
        raise SettingsError(f"ckpt_path={ckpt_path}: not found; give a .ckpt file or folder of an earlier run.")
    step = read_checkpoint(path)["global_step"]
    if step > max_steps or (step == max_steps and ended):
        raise SettingsError(
            f"ckpt_path={path}: is at step {step} of trainer.max_steps={max_steps}, so nothing is left to train; "
            "give a larger trainer.max_steps."
        )
    return str(path)


def check_fits(path: str, model: LightningModule) -> None:
    """Check that a training can resume from a checkpoint, before anything is written.

    Args:
        path: the checkpoint.
        model: set up for the training, and attached to the trainer.

    Raises:
        SettingsError: if it cannot.
    """
    model.on_load_checkpoint(read_index(Path(path)) if is_sharded(path) else open_checkpoint(path))


def newest_intact(folder: Path) -> Path:
    """The newest intact checkpoint of a folder; corrupt ones are reported and skipped.

    Raises:
        SettingsError: if there is none.
    """
    files = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)
    for file in files:
        if is_intact(file):
            return file
        rank_zero_warn(f"{file} is corrupt and is skipped.")
    corrupt = f" ({len(files)} corrupt)" if files else ""
    raise SettingsError(
        f"ckpt_path=last: no intact checkpoint in {folder}{corrupt}; give output_dir=… of a run that left one."
    )


class FinishTraining(Callback):
    """Finish a training that took all its steps but was stopped before its end.

    Lightning would return at once: nothing would be validated, sampled or exported. So one more step is allowed until
    the last validation is done.

    Args:
        max_steps: optimizer steps of the training.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_last_step(trainer, self.max_steps + 1)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not resumes_validation(trainer):
            set_last_step(trainer, self.max_steps)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        set_last_step(trainer, self.max_steps)
