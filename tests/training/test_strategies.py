"""Strategies that shard the model are refused, also under a trainer of one's own."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.autoencoder import AutoencoderModule


@pytest.mark.parametrize("kind", [StableDiffusionModule, AutoencoderModule])
def test_a_sharding_strategy_is_refused_before_anything_is_written(kind, checkpoint, tmp_path):
    own = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": tmp_path}
    trainer = Trainer(strategy=ModelParallelStrategy(), **own)
    try:
        with pytest.raises(SettingsError, match=r"ModelParallelStrategy: shards the model.*use trainer=ddp"):
            trainer.fit(kind(str(checkpoint)), ShapesDataModule(batch_size=1, train_length=2, val_length=1, size=32))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert not list(tmp_path.iterdir())
