"""Which checkpoint a training goes on from, and whether it can."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from sdmodule.errors import SettingsError
from sdmodule.training.checkpoint_io import is_intact, read_checkpoint


def find_checkpoint(ckpt_path: str | None, output_dir: Path, max_steps: int, ended: bool = True) -> str | None:
    """The checkpoint to go on from.

    Args:
        ckpt_path: a file, a folder of shards, or ``last`` for the newest whole one in ``output_dir/checkpoints``;
            None starts anew.
        output_dir: folder of the run.
        max_steps: step at which the training ends.
        ended: whether all that a training leaves at its end is there, so that its last checkpoint is no use.

    Raises:
        SettingsError: if there is none, if it is broken, or if it leaves nothing to train.
    """
    if ckpt_path is None:
        return None
    path = newest_intact(output_dir / "checkpoints") if ckpt_path == "last" else Path(ckpt_path).expanduser()
    if os.path.isdir(path):  # in shards: a folder, which only its own strategy can read
        return str(path)
    if not os.path.isfile(path):
        raise SettingsError(f"ckpt_path={ckpt_path} was not found; give a .ckpt file of an earlier run.")
    step = read_checkpoint(path)["global_step"]
    if step > max_steps or (step == max_steps and ended):
        raise SettingsError(
            f"ckpt_path={path} is of step {step} and trainer.max_steps={max_steps}, which leaves nothing to train; "
            "give a larger trainer.max_steps."
        )
    return str(path)


def check_fits(path: str, model: LightningModule, trainer: Trainer) -> None:
    """Check that a training can go on from a checkpoint, before anything is written.

    Args:
        path: of the checkpoint.
        model: set up for the training.
        trainer: of the training, which the model knows.

    Raises:
        SettingsError: if not.
    """
    if not os.path.isdir(path):
        model.on_load_checkpoint(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    elif type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy):
        raise SettingsError(
            f"ckpt_path={path} is a folder, such as trainer=fsdp and deepspeed alone write; give a .ckpt file, or last."
        )


def newest_intact(folder: Path) -> Path:
    """The newest checkpoint of a folder whose bytes are those that were written; broken ones are named and passed over.

    Raises:
        SettingsError: if there is none.
    """
    files = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)
    for file in files:
        if file.is_dir() or is_intact(file):
            return file
        rank_zero_warn(f"{file} is broken and is passed over.")
    broken = f"; the {len(files)} that are there are broken" if files else ""
    raise SettingsError(
        f"ckpt_path=last found no checkpoint in {folder}{broken}; give output_dir=… of a run that left one."
    )


class FinishTraining(Callback):
    """Lets a training that has made all its steps, and was stopped before its end, come to it.

    Lightning leaves such a one alone: nothing is validated, sampled or exported. So it is allowed one step more, until
    the last validation is made.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps + 1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation = trainer.fit_loop.epoch_loop.val_loop
        if validation.skip or not validation.restarted_mid_evaluation:
            trainer.fit_loop.epoch_loop.max_steps = self.max_steps

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
