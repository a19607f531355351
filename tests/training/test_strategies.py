"""Strategies that shard the model in a way that was never tested are refused, also under a trainer of one's own."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from sdmodule.cli.main import predict_main
from sdmodule.cli.trainer import make_trainer
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.autoencoder import AutoencoderModule
from sdmodule.training.sharded_strategy import FullyShardedStrategy


@pytest.mark.parametrize("name", ["deepspeed_stage_2", "fsdp_cpu_offload", "model_parallel"])
def test_the_name_of_another_sharding_strategy_is_refused(name):
    with pytest.raises(SettingsError, match=rf"trainer.strategy={name}: .*use trainer=fsdp"):
        make_trainer(accelerator="cpu", strategy=name)


@pytest.mark.parametrize(
    ("kind", "strategy", "message"),
    [
        (StableDiffusionModule, ModelParallelStrategy, r"ModelParallelStrategy: .*FullyShardedStrategy"),
        (AutoencoderModule, ModelParallelStrategy, r"ModelParallelStrategy: .*FullyShardedStrategy"),
        (AutoencoderModule, FullyShardedStrategy, r"trainer=fsdp: .*use trainer=ddp"),
    ],
)
def test_a_sharding_strategy_is_refused_before_anything_is_written(kind, strategy, message, checkpoint, tmp_path):
    own = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": tmp_path}
    trainer = Trainer(strategy=strategy(), **own)
    try:
        with pytest.raises(SettingsError, match=message):
            trainer.fit(kind(str(checkpoint)), ShapesDataModule(batch_size=1, train_length=2, val_length=1, size=32))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuning": {"kind": "textual_inversion", "placeholder": "<x>", "initializer": "circle"}}, "nothing to shard"),
        ({"training": {"compile": "blocks"}}, r"training.compile=blocks: .*use trainer=ddp"),
        ({"optimizer": torch.optim.Adafactor}, r"model.optimizer=Adafactor: .*SGD of torch.optim"),
    ],
)
def test_a_training_that_was_never_sharded_is_refused(settings, message, checkpoint):
    module = StableDiffusionModule(str(checkpoint), **settings)
    module.trainer = make_trainer(accelerator="cpu", strategy="fsdp")
    with pytest.raises(SettingsError, match=message):
        module.setup("fit")


def test_text_encoders_of_which_inner_states_are_read_are_refused(xl_checkpoint):
    module = StableDiffusionModule(str(xl_checkpoint), tuning={"kind": "full", "text_encoder": True})
    module.trainer = make_trainer(accelerator="cpu", strategy="fsdp")
    with pytest.raises(SettingsError, match=r"tuning.text_encoder=true: .*use trainer=ddp"):
        module.setup("fit")


def test_sampling_is_not_sharded(call, checkpoint, tmp_path):
    command = [f"pretrained={checkpoint}", "prompt=a star", f"output_dir={tmp_path / 'out'}"]
    status, _, error = call(predict_main, *command, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1")
    assert status == 1 and "use trainer=ddp" in error
    assert not (tmp_path / "out").exists()
