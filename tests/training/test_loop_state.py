"""A canary: Lightning's loop internals are where ``training/loop_state.py`` expects them."""

from __future__ import annotations

import lightning
import pytest
from lightning import Callback, Trainer

from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.module import StableDiffusionModule
from sdmodule.training import loop_state


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


VERIFIED = ("2.6.6",)
"""Lightning versions with which tests/faults and tests/training passed."""


def test_this_lightning_was_verified():
    assert lightning.__version__ in VERIFIED, (
        f"Lightning {lightning.__version__} may have moved its loops: run tests/faults and tests/training, "
        "then add it to VERIFIED."
    )


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.states: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(loop_state.batches_seen(trainer))
        self.states.append(loop_state.LoopState(trainer).state())
        loop_state.schedule_validation(trainer, now=trainer.global_step == 2)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validated_at = trainer.global_step


@pytest.fixture
def watched(checkpoint):
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=100,
        check_val_every_n_epoch=None,
        callbacks=[watch],
    )
    data = ShapesDataModule(batch_size=2, train_length=6, val_length=2, size=32)
    trainer.fit(StableDiffusionModule(str(checkpoint), tuning={"kind": "lora"}), data)
    return trainer, watch


def test_the_loops_count_and_validate_as_expected(watched):
    trainer, watch = watched
    assert watch.seen == [1, 2, 3, 4, 5]
    assert watch.validated_at == 2
    assert loop_state.resumed_batch(trainer) is None and not loop_state.resumes_validation(trainer)
    third = watch.states[2]  # the last step of the first epoch, from which the second one begins
    assert third[loop_state.PROGRESS]["current"] == {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    assert third[loop_state.PROGRESS]["total"]["completed"] == 3
    assert third["epoch_progress"]["current"]["completed"] == 1
    loop_state.set_last_step(trainer, 7)
    assert trainer.max_steps == 7
