"""Where a training stands after an optimizer's step, in the form from which Lightning goes on exactly there.

Lightning writes down where its loops are at the moment of saving. From some of those moments it does not go on as if
nothing had been: within the batches of one step it leaves out those that it has seen, whose gradients are lost; a
validation that was due, or that was stopped, it leaves out or counts in halves; a figure may be logged a step too late.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning import Trainer

PROGRESS = "epoch_loop.batch_progress"
VALIDATION = "epoch_loop.val_loop.batch_progress"


class LoopState:
    """The loops after a step.

    Args:
        trainer: at the end of the step's last batch, in ``on_train_batch_end``.

    Attributes:
        step: optimizer steps that are done.
        batches: that were seen, over all epochs.
        due: whether a validation follows, and has not come to its end.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.step = trainer.global_step
        self.loops = copy.deepcopy(trainer.fit_loop.state_dict())
        batches = self.loops[PROGRESS]
        self.batches: int = batches["total"]["ready"]
        checked = trainer.enable_validation and self.batches % trainer.val_check_batch == 0
        self.at_validation = self.due = checked

    def state(self) -> dict[str, Any]:
        """The state of the fit loop for a checkpoint."""
        loops = copy.deepcopy(self.loops)
        batches, epochs, stepped = loops[PROGRESS], loops["epoch_progress"], loops["epoch_loop.state_dict"]
        for counts in (batches["total"], batches["current"]):
            counts["completed"] = counts["processed"]
        begun = int(self.due)  # one that is due is as if its first batch had been begun: it is made from the start
        loops[VALIDATION] = {
            "total": {"ready": begun, "started": begun, "processed": 0, "completed": 0},
            "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
            "is_last_batch": False,
        }
        if self.at_validation:  # Lightning goes on behind it, and counts the step there
            return loops
        stepped["_batches_that_stepped"] += 1
        if batches["is_last_batch"]:  # the next epoch begins
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False
            for counts in (epochs["total"], epochs["current"]):
                counts["processed"] = counts["completed"] = counts["started"]
        return loops
