"""EMA: the average, where it is used, and that checkpoints keep it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sdmodule.callbacks.ema import EMA, load_average, trainable_parameters
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests.fitting import fit

pytestmark = pytest.mark.slow  # each test trains several times


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


class Recorder(Callback):
    """Records the weights after each step, and those that validation sees."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.trained.append(copied(pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(copied(pl_module))


def copied(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainable_parameters(module).items()}


def assert_equal(weights: dict[str, Tensor], others: dict[str, Tensor], **tolerance) -> None:
    torch.testing.assert_close(weights, others, **(tolerance or {"rtol": 0, "atol": 0}))


def train(checkpoint: Path, steps: int, *callbacks: Callback, resume: Path | None = None, **settings):
    module = StableDiffusionModule(
        str(checkpoint), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), sampling={"steps": 1}
    )
    settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0, **settings}
    data = ShapesDataModule(batch_size=2, train_length=4, val_length=4, size=32)
    trainer = fit(module, data, steps, *callbacks, resume=resume, **settings)
    return module, trainer


def test_the_average_of_three_steps_matches_the_formula(checkpoint):
    recorder, ema = Recorder(), EMA(decay=0.2, start_step=1)
    module, _ = train(checkpoint, 3, recorder, ema)
    first, second, third = recorder.trained
    expected = {}
    for name in first:
        average = 2 / 11 * first[name] + 9 / 11 * second[name]  # the first update's decay is (1 + 1) / (10 + 1)
        expected[name] = 0.2 * average + 0.8 * third[name]  # (1 + 2) / (10 + 2) is more than the decay asked for
    assert_equal(ema.average, expected, rtol=1e-5, atol=1e-7)
    assert_equal(copied(module), third)
    assert {name.split(".")[0] for name in ema.average} == {"unet"}


def test_raw_weights_are_used_before_the_first_averaged_step(checkpoint):
    recorder, ema = Recorder(), EMA(start_step=3)
    train(checkpoint, 2, recorder, ema, limit_val_batches=1, val_check_interval=1)
    assert not ema.average
    assert_equal(recorder.validated[-1], recorder.trained[-1])


def test_validation_uses_the_average_and_training_keeps_the_raw_weights(checkpoint):
    recorder, ema, without_ema = Recorder(), EMA(start_step=1), Recorder()
    module, _ = train(checkpoint, 3, recorder, ema, limit_val_batches=1, val_check_interval=1)
    assert len(recorder.validated) == 3
    assert_equal(recorder.validated[-1], ema.average)
    assert_equal(copied(module), recorder.trained[-1])
    assert not torch.equal(ema.average["unet.conv_in.weight"], module.unet.conv_in.weight)
    train(checkpoint, 3, without_ema)
    assert_equal(recorder.trained[-1], without_ema.trained[-1])


NAMES = ["val/loss", *(f"val/loss_{start}_{start + 249}" for start in (0, 250, 500, 750))]


@pytest.mark.parametrize("start", [1, 9], ids=["averaged", "before the average"])
def test_validation_logs_the_loss_of_the_average_and_of_the_raw_weights(checkpoint, start):
    ema = EMA(start_step=start)
    module, trainer = train(checkpoint, 3, ema, limit_val_batches=2, val_check_interval=3, check_val_every_n_epoch=None)
    reported = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    raw = validated(module)
    if start == 9:
        assert reported == pytest.approx(raw)
        return
    assert reported == pytest.approx({f"{name}_raw": value for name, value in raw.items()} | validated(module, ema))
    assert all(reported[name] != reported[f"{name}_raw"] for name in NAMES)


def validated(module: StableDiffusionModule, ema: EMA | None = None) -> dict[str, float]:
    """Validation metrics of a module's weights, or of their average."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = ShapesDataModule(batch_size=2, train_length=4, val_length=4, size=32)
    with ema.applied(module) if ema else nullcontext():
        [found] = trainer.validate(module, data, verbose=False)
    assert sorted(found) == sorted(NAMES)
    return found


def test_load_average_restores_the_average_from_a_checkpoint(checkpoint, tmp_path):
    ema = EMA(start_step=1)
    module, trainer = train(checkpoint, 3, ema)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    again = StableDiffusionModule.load_from_checkpoint(tmp_path / "three.ckpt", weights_only=True)
    assert_equal(copied(again), copied(module))
    load_average(again, tmp_path / "three.ckpt")
    assert_equal(copied(again), ema.average)


@pytest.mark.parametrize("callbacks", [[], [EMA(start_step=9)]], ids=["no EMA", "before the average"])
def test_load_average_refuses_a_checkpoint_without_an_average(checkpoint, tmp_path, callbacks):
    module, trainer = train(checkpoint, 1, *callbacks)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(SettingsError, match=r"one\.ckpt: holds no average"):
        load_average(module, tmp_path / "one.ckpt")


def test_applied_restores_the_raw_weights_even_after_an_error(checkpoint):
    ema = EMA(start_step=1)
    module, _ = train(checkpoint, 2, ema)
    raw = copied(module)
    with pytest.raises(KeyError), ema.applied(module):
        assert_equal(copied(module), ema.average)
        weight = module.unet.conv_in.weight
        assert weight.data_ptr() == ema.average["unet.conv_in.weight"].data_ptr()  # nothing was copied
        raise KeyError
    assert_equal(copied(module), raw)


class Interrupted(dict):
    """Averages, of which the fifth that is asked for meets a signal."""

    asked = 0

    def __getitem__(self, name):
        self.asked += 1
        if self.asked == 5:
            raise KeyboardInterrupt
        return super().__getitem__(name)


def test_a_signal_while_weights_are_swapped_leaves_the_raw_ones(checkpoint):
    ema = EMA(start_step=1)
    module, trainer = train(checkpoint, 2, ema)
    raw = copied(module)
    ema.average = Interrupted(ema.average)
    with pytest.raises(KeyboardInterrupt) as caught:
        ema.on_validation_epoch_start(trainer, module)
    ema.on_exception(trainer, module, caught.value)
    assert_equal(copied(module), raw)


def test_weights_that_share_memory_are_copied_and_restored(checkpoint):
    """As those of strategies that keep a model in one piece."""
    ema = EMA(start_step=1)
    module, _ = train(checkpoint, 2, ema)
    weight = module.unet.conv_in.weight
    weight.data = torch.cat([weight.data, weight.data])[: len(weight)]
    raw, place = copied(module), weight.data_ptr()
    with ema.applied(module):
        assert_equal(copied(module), ema.average)
        assert weight.data_ptr() == place
    assert_equal(copied(module), raw)


def test_only_optimizer_steps_are_averaged(checkpoint):
    ema = EMA(start_step=1)
    train(checkpoint, 3, ema, accumulate_grad_batches=2)
    assert ema.updates == 2  # the first of three steps starts the average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_continues_the_average(checkpoint, tmp_path, accumulate):
    straight, resumed = EMA(start_step=1), EMA(start_step=1)
    train(checkpoint, 6, straight, checkpoints(tmp_path), accumulate_grad_batches=accumulate)
    saved, again = tmp_path / "step=4.ckpt", checkpoints(tmp_path / "again")
    train(checkpoint, 6, resumed, again, resume=saved, accumulate_grad_batches=accumulate)
    assert resumed.updates == straight.updates == 5
    assert_equal(resumed.average, straight.average)


def checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
