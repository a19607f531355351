"""Row 12: Lightning's own averaging and tuning callbacks work and resume, or are refused with the name of ours."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner

from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests.reported.drawing import numbered

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@pytest.fixture
def data(tmp_path):
    return ImageFolderDataModule(str(numbered(tmp_path / "photos", 6)), resolution=32, batch_size=2, val_fraction=0.2)


def trainer(**settings) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{**quiet, "enable_checkpointing": False, "max_steps": 4, "max_epochs": -1, **settings})


@pytest.mark.parametrize(
    "callback", [EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(swa_lrs=1e-4, swa_epoch_start=1)]
)
def test_averages_that_cannot_be_resumed_are_refused_by_the_name_of_ours(checkpoint, data, callback):
    module = StableDiffusionModule(str(checkpoint))
    with pytest.raises(SettingsError, match=rf"{type(callback).__name__}: .*use sdmodule\.callbacks\.EMA"):
        trainer(callbacks=[callback]).fit(module, data)


def test_a_learning_rate_is_found_and_the_model_is_as_before(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = StableDiffusionModule(str(checkpoint))
    module.lr = 1e-5
    before = module.unet.conv_out.weight.clone()
    found = Tuner(trainer()).lr_find(module, datamodule=data, num_training=6, min_lr=1e-6, max_lr=1e-3)
    assert len(found.results["lr"]) == 6 and torch.equal(module.unet.conv_out.weight, before)


def test_a_batch_size_is_found(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = StableDiffusionModule(str(checkpoint))
    before = module.unet.conv_out.weight.clone()
    size = Tuner(trainer()).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1, init_val=1)
    assert size >= 2 and data.batch_size == size and torch.equal(module.unet.conv_out.weight, before)
