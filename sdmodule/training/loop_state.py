"""Lightning's loop internals: the one file that touches them.

``tests/training/test_loop_state.py`` names the Lightning versions that this was verified on, and fails on any other.

Lightning records where its loops are when a checkpoint is written. From some of those places it does not resume
exactly: within an accumulation window it skips the batches already seen, whose gradients are lost; a validation that
was due or interrupted is skipped or counted in halves; a metric may be logged one step late. `LoopState` records the
loops at the end of the last optimizer step instead, in the form from which Lightning resumes exactly there.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning import Trainer

PROGRESS = "epoch_loop.batch_progress"
VALIDATION = "epoch_loop.val_loop.batch_progress"


class LoopState:
    """The loops after an optimizer step.

    Args:
        trainer: at the end of the step's last batch, in ``on_train_batch_end``.

    Attributes:
        step: optimizer steps done.
        batches: batches seen, over all epochs.
        validation_due: whether a validation follows and has not finished.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.step = trainer.global_step
        self.loops = copy.deepcopy(trainer.fit_loop.state_dict())
        self.batches: int = self.loops[PROGRESS]["total"]["ready"]
        self.at_validation = trainer.enable_validation and self.batches % trainer.val_check_batch == 0
        self.validation_due = self.at_validation

    def validation_finished(self, trainer: Trainer) -> None:
        """Note that the validation after this step has finished, if it is this step's."""
        if batches_seen(trainer) == self.batches:
            self.validation_due = False

    def state(self) -> dict[str, Any]:
        """The fit loop's state for a checkpoint."""
        loops = copy.deepcopy(self.loops)
        batches, epochs, stepped = loops[PROGRESS], loops["epoch_progress"], loops["epoch_loop.state_dict"]
        for counts in (batches["total"], batches["current"]):
            counts["completed"] = counts["processed"]
        begun = int(self.validation_due)  # a pending validation looks begun, so that it runs from its start
        loops[VALIDATION] = {
            "total": {"ready": begun, "started": begun, "processed": 0, "completed": 0},
            "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
            "is_last_batch": False,
        }
        if self.at_validation:  # Lightning resumes behind it, and counts the step there
            return loops
        stepped["_batches_that_stepped"] += 1
        if batches["is_last_batch"]:  # the next epoch begins
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False
            for counts in (epochs["total"], epochs["current"]):
                counts["processed"] = counts["completed"] = counts["started"]
        return loops


def write_loop_state(checkpoint: dict[str, Any], state: LoopState) -> None:
    """Replace the fit loop's state in a checkpoint."""
    checkpoint["loops"]["fit_loop"] = state.state()


def batches_seen(trainer: Trainer) -> int:
    """Training batches seen so far, over all epochs."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def resumed_batch(trainer: Trainer) -> int | None:
    """Batches of the epoch that a resumed training has seen already; None if it is not resuming."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer.fit_loop.restarting else None


def renumber_batches(trainer: Trainer, done: int) -> None:
    """Give the next batch of a resumed epoch another number, because batches have another size than before.

    Lightning's own checkpoint counts its last batch as not completed yet, and does so when it is resumed.
    """
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    pending = current.processed - current.completed
    for count in ("ready", "started", "processed"):
        setattr(current, count, done)
    current.completed = done - pending


def schedule_validation(trainer: Trainer, now: bool) -> None:
    """Let Lightning validate after the current batch, or not.

    Lightning validates after multiples of ``val_check_batch``, counted within the epoch unless it ignores epochs.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    batches = (progress.total if trainer.check_val_every_n_epoch is None else progress.current).ready
    trainer.val_check_batch = batches if now else batches + 1


def set_last_step(trainer: Trainer, step: int) -> None:
    """Let the training end after an optimizer step, whatever ``max_steps`` it was started with."""
    trainer.fit_loop.epoch_loop.max_steps = step


def resumes_validation(trainer: Trainer) -> bool:
    """Whether a resumed training starts with a validation that was pending."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    return not validation.skip and validation.restarted_mid_evaluation
