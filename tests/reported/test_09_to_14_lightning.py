"""Rows 9 to 14: what Lightning's users do first with the module, in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning import Trainer
from torch.utils.data import DataLoader

from sdmodule.cli.instantiate import instantiate
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.autoencoder import AutoencoderModule

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


CAPTIONS = ["a red circle", "a blue star", "a green square", "a yellow heart"]
TUNINGS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora"},
    "textual_inversion": {"kind": "textual_inversion", "placeholder": "<x>", "initializer": "star"},
    "controlnet": {"kind": "controlnet"},
}


def examples(count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((count, 3, 32, 32), generator=generator) * 2 - 1
    return [{"image": image, "caption": CAPTIONS[k % 4]} for k, image in enumerate(images)]


def loader(data: list | None = None, **settings) -> DataLoader:
    return DataLoader(examples() if data is None else data, **{"batch_size": 2, **settings})


def quiet(**settings) -> Trainer:
    common = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{**common, "enable_checkpointing": False, "max_steps": 2, **settings})


# ---------------------------------------------------------------------------------------------- row 9


@pytest.mark.parametrize("kind", TUNINGS)
def test_row_9_the_default_optimizer_is_that_of_the_configuration(checkpoint, kind):
    module = StableDiffusionModule(str(checkpoint), tuning=TUNINGS[kind])
    ours = module.configure_optimizers()
    overrides = [f"tuning={kind}", f"pretrained={checkpoint}", "data=shapes"]
    overrides += ["tuning.placeholder='<x>'", "tuning.initializer=star"] if kind == "textual_inversion" else []
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        theirs = instantiate(compose("train", overrides).model).configure_optimizers()
    assert type(ours) is type(theirs) is torch.optim.AdamW
    assert {k: v for k, v in ours.defaults.items() if k != "fused"} == {
        k: v for k, v in theirs.defaults.items() if k != "fused"
    }


def test_row_9_the_autoencoders_default_is_that_of_the_configuration(checkpoint):
    ours = AutoencoderModule(str(checkpoint)).configure_optimizers()
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        config = compose("train", ["model=autoencoder", f"pretrained={checkpoint}", "data=shapes"])
    assert ours.defaults["lr"] == config.model.optimizer.lr


# ---------------------------------------------------------------------------------------------- rows 10 and 11


class OwnOptimizer(StableDiffusionModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.unet.conv_out.parameters(), lr=0.1, momentum=0.9)

    def on_train_start(self):
        self.momentum = [state["momentum_buffer"].clone() for state in self.optimizers().optimizer.state.values()]


def test_row_10_an_optimizer_of_ones_own_is_resumed(checkpoint, tmp_path):
    module, trainer = OwnOptimizer(str(checkpoint)), quiet(max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    held = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
    resumed, longer = OwnOptimizer(str(checkpoint)), quiet(max_steps=4, max_epochs=-1)
    longer.fit(resumed, loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert longer.global_step == 4 and not module.momentum
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed.momentum, held, strict=True))


def test_row_11_a_part_frozen_by_hand_makes_checkpoints_that_load(checkpoint, tmp_path):
    module = StableDiffusionModule(str(checkpoint))
    module.unet.down_blocks.requires_grad_(False)
    trainer = quiet()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    loaded = StableDiffusionModule.load_from_checkpoint(tmp_path / "frozen.ckpt", weights_only=True)
    for (name, ours), theirs in zip(loaded.unet.named_parameters(), module.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_row_11_a_checkpoint_that_lost_weights_is_still_refused(checkpoint, tmp_path):
    module = StableDiffusionModule(str(checkpoint))
    trainer = quiet()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    content = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, tmp_path / "cut.ckpt")
    with pytest.raises(SettingsError, match="1 missing, such as unet"):
        StableDiffusionModule.load_from_checkpoint(tmp_path / "cut.ckpt", weights_only=True)


# ---------------------------------------------------------------------------------------------- row 13


def test_row_13_test_logs_the_metrics_of_validation(module):
    trainer = quiet()
    [validated] = trainer.validate(module, loader(), verbose=False)
    [tested] = trainer.test(module, loader(), verbose=False)
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == validated
    assert "test/loss" in tested


def test_row_13_two_validation_loaders_are_logged_apart(module):
    both = quiet().validate(module, [loader(examples(2)), loader()], verbose=False)
    assert [sorted(name.rpartition("/")[2] for name in one if "loss/" in name) for one in both] == [
        ["dataloader_idx_0"],
        ["dataloader_idx_1"],
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_row_13_plain_prompts_are_predicted(module, batch_size):
    module.sampling = module.sampling.updated(steps=4)
    batches = quiet().predict(module, DataLoader(CAPTIONS, batch_size=batch_size))
    images = [image for batch in batches for image in batch.images()]
    wanted = module.infer(CAPTIONS, show_progress=False)["samples"]
    for ours, theirs in zip(images, wanted, strict=True):  # other batches round their last bit differently
        assert abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_row_13_captions_of_a_data_set_are_predicted(module):
    [batch] = quiet().predict(module, loader(batch_size=4))
    assert [request.prompt for request in batch.requests] == CAPTIONS


def test_row_13_forward_is_the_denoiser(module):
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    text = module.encode_captions(CAPTIONS[:2]).hidden_states
    with torch.no_grad():
        assert torch.equal(
            module(latents, timesteps, text), module.unet(latents, timesteps, encoder_hidden_states=text).sample
        )


def test_row_13_a_pair_of_images_and_captions_is_a_batch(checkpoint):
    pairs = [(one["image"], one["caption"]) for one in examples()]
    weights = []
    for data in (pairs, examples()):
        module = StableDiffusionModule(str(checkpoint))
        quiet().fit(module, loader(data), loader(data))
        weights.append(module.unet.conv_out.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"image": torch.zeros(3, 32, 32)}] * 2, "a batch with no caption; a batch is a mapping with image"),
        ([{"caption": "a"}] * 2, "a batch with caption; a batch is a mapping"),
        ([{"pixel_values": torch.zeros(3, 32, 32), "caption": "a"}] * 2, r"pixel_values \[2, 3, 32, 32\], caption"),
        ([torch.zeros(3, 32, 32)] * 2, "gave a Tensor; a batch is a mapping"),
        ([(torch.zeros(3, 32, 32), 4)] * 2, "a caption of type Tensor"),
        ([{"image": torch.zeros(3, 32), "caption": "a"}] * 2, r"image \[2, 3, 32\]"),
        (["text"] * 2, "gave a list; a batch is a mapping"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_row_13_a_wrong_batch_gets_one_sentence(module, data, message, stage):
    trainer = quiet()
    with pytest.raises(SettingsError, match=message):
        trainer.fit(module, loader(data)) if stage == "fit" else trainer.validate(module, loader(data))


# ---------------------------------------------------------------------------------------------- row 14


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 32, 32), 200, dtype=torch.uint8), "image as uint8; give floats from -1 to 1"),
        (torch.full((3, 32, 32), 3), "image as int64"),
        (torch.full((3, 32, 32), 255.0), "image with values from 255 to 255; they must be from -1 to 1"),
        (torch.full((3, 32, 32), -1.5), "image with values from -1.5 to -1.5"),
        (torch.full((3, 32, 32), float("nan")), "image with values from nan to nan"),
    ],
)
@pytest.mark.parametrize("kind", [StableDiffusionModule, AutoencoderModule])
def test_row_14_images_outside_their_range_are_refused(checkpoint, image, message, kind):
    good, bad = examples(2), [{"image": image, "caption": "a"}] * 2
    for data in (bad, good + bad):
        with pytest.raises(SettingsError, match=message):
            quiet(max_steps=5).fit(kind(str(checkpoint)), loader(data if image.is_floating_point() else bad))


def test_row_14_masks_and_control_images_have_a_range_too(checkpoint):
    module = StableDiffusionModule(str(checkpoint), tuning={"kind": "controlnet"})
    data = [{**one, "conditioning": torch.full((3, 32, 32), 255.0)} for one in examples()]
    with pytest.raises(SettingsError, match="conditioning with values from 255 to 255; they must be from 0 to 1"):
        fit_on(module, data)


def fit_on(module, data) -> None:
    quiet().fit(module, loader(data))


def test_rounding_is_no_fault(module):
    fit_on(module, [{**one, "image": one["image"].sign() * (1 + 1e-6)} for one in examples()])
