"""Tuning methods: what they train, how they resume, and sampling from what they export."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from lightning import Callback
from PIL import Image
from safetensors.torch import load_file

from sdmodule.callbacks.checkpoint import TrainingCheckpoint
from sdmodule.callbacks.ema import EMA
from sdmodule.cli.main import predict_main, train_main
from sdmodule.components.source import ASSETS
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.module import StableDiffusionModule
from sdmodule.training.lora import LoraTuning
from tests.fitting import fit

pytestmark = pytest.mark.slow  # each test trains


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


WORD = "<my-cat>"


def fast(groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3)


def images(photos: Path, **settings) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(photos), **{"resolution": 32, "batch_size": 2, "val_fraction": 0, **settings})


def trained(module: StableDiffusionModule) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in module.named_parameters() if w.requires_grad}


TUNINGS = {
    "lora": {"kind": "lora", "dropout": 0.3, "text_encoder": True},
    "dora": {"kind": "lora", "method": "dora"},
    "lokr": {"kind": "lora", "method": "lokr", "dropout": 0.3},
    "textual_inversion": {"kind": "textual_inversion", "placeholder": WORD, "initializer": "star", "vectors": 2},
    "controlnet": {"kind": "controlnet"},
    "full": {"kind": "full", "text_encoder": True, "text_encoder_lr": 1e-4, "text_encoder_stop": 2},
}


@pytest.mark.parametrize("kind", TUNINGS)
def test_only_trained_weights_change_and_a_resumed_training_equals_an_uninterrupted_one(
    checkpoint, photos, tmp_path, kind
):
    conditioning = "canny" if kind == "controlnet" else None

    def build() -> StableDiffusionModule:
        return StableDiffusionModule(str(checkpoint), tuning=TUNINGS[kind], optimizer=fast)

    def data() -> ImageFolderDataModule:
        return images(photos, random_flip=True, conditioning=conditioning, prompt=f"a {WORD}")

    uninterrupted, resumed = build(), build()
    before, frozen = trained(uninterrupted), dict(uninterrupted.named_parameters())
    frozen = {name: value.detach().clone() for name, value in frozen.items() if name not in before}
    saved = TrainingCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(uninterrupted, data(), 4, saved, EMA(start_step=1))
    torch.manual_seed(99)  # the global random state must not matter
    fit(resumed, data(), 4, EMA(start_step=1), resume=tmp_path / "step=2.ckpt", accumulate_grad_batches=1)
    after, others = trained(uninterrupted), trained(resumed)
    assert all(torch.equal(after[name], others[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    left = dict(uninterrupted.named_parameters())
    assert all(torch.equal(left[name], value) for name, value in frozen.items())
    content = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert content["state_dict"].keys() == after.keys()


def test_the_text_encoder_has_its_own_learning_rate_and_last_step(checkpoint, photos):
    module = StableDiffusionModule(str(checkpoint), tuning=TUNINGS["full"], optimizer=fast)
    assert [group.get("lr") for group in module.configure_optimizers().param_groups] == [1e-3, 1e-4]
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({name: value.detach().clone() for name, value in pl_module.text_encoder.named_parameters()})

    fit(module, images(photos), 4, Watch())
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(seen)]
    assert changed == [True, False, False], "text_encoder_stop=2"


def test_an_exported_lora_is_sampled_and_its_image_made_again_from_the_png(tmp_path, call, train_export, sample_image):
    settings = ["tuning=lora", "tuning.rank=2", "cache=all", f"cache.folder={tmp_path / 'cache'}"]
    export = train_export(tmp_path / "out", *settings)
    metadata = json.loads((export / "training.json").read_text())
    assert metadata["weights"] == "ema" and metadata["steps"] == 3
    assert (tmp_path / "out" / "samples" / "000003.png").is_file()
    adapters = f"adapters=[{{path: {export}, scale: 0.8}}]"
    plain = sample_image(tmp_path / "plain")
    adapted = sample_image(tmp_path / "adapted", adapters)
    assert not np.array_equal(adapted, plain)
    png = tmp_path / "adapted" / "images" / "00000-0.png"
    assert json.loads(Image.open(png).text["adapters"]) == [{"path": str(export), "scale": 0.8}]
    assert call(predict_main, "--from", png, f"output_dir={tmp_path / 'again'}")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / "images" / "00000-0.png")), adapted)


def test_an_exported_controlnet_is_sampled(photos, tmp_path, train_export, sample_image):
    export = train_export(tmp_path / "out", "tuning=controlnet", "data.batch_size=2")
    assert ControlNetModel.from_pretrained(export).config.block_out_channels == [32]
    assert (tmp_path / "out" / "samples" / "000003.png").is_file()
    sample_image(tmp_path / "made", f"controlnet={export}", f"control={photos / '1.png'}")


@pytest.mark.parametrize("settings", [["tuning=controlnet"], ["model=inpaint", "training.inpaint.convert=true"]])
def test_sample_sheets_take_images_of_several_sizes(photos, tmp_path, train_export, settings):
    Image.new("RGB", (64, 32)).save(photos / "5.png")
    settings = [*settings, "data.buckets=true", "data.batch_size=1", "callbacks.samples.num_prompts=6"]
    export = train_export(tmp_path / "out", *settings, "resolution=32")
    assert export.is_dir() and (tmp_path / "out" / "samples" / "000003.png").is_file()


def test_sample_sheets_need_no_validation_data_and_do_not_change_training(tmp_path, train_export):
    settings = ["tuning=controlnet", "data.random_flip=true", "data.template=['a {}','the {}']", "data.batch_size=2"]
    settings += ["data.num_workers=1", "trainer.val_check_interval=1"]
    with_sheets = [*settings, "callbacks.samples.num_prompts=2", "+callbacks.checkpoint.save_top_k=-1"]
    with_sheets += ["callbacks.checkpoint.every_n_train_steps=1"]

    def train(name: str, *given: str) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
        export = train_export(tmp_path / name, *given)
        sheets = {file.name: file.read_bytes() for file in (tmp_path / name).glob("samples/*.png")}
        return sheets, load_file(export / "diffusion_pytorch_model.safetensors")

    first, uninterrupted = train("out", *with_sheets)
    assert sorted(first) == [f"{step:06d}.png" for step in (1, 2, 3)] and len({*first.values()}) == 3
    again, resumed = train("again", *with_sheets, f"ckpt_path={tmp_path / 'out' / 'checkpoints' / 'step=1.ckpt'}")
    assert again == {name: first[name] for name in ("000002.png", "000003.png")}
    _, without_sheets = train("without_sheets", *settings, "callbacks=[ema,export]")
    for key, weight in uninterrupted.items():
        assert torch.equal(weight, resumed[key]) and torch.equal(weight, without_sheets[key])


@pytest.mark.parametrize("model", ["text2image", "autoencoder"])
def test_a_resolution_that_is_not_a_multiple_of_4_is_refused(checkpoint, photos, tmp_path, call, model):
    out = tmp_path / "out"
    given = [f"pretrained={checkpoint}", f"data.root={photos}", "resolution=[32,38]", f"output_dir={out}"]
    status, _, error = call(train_main, f"model={model}", "callbacks=[]", *given)
    assert status == 1 and error.count("\n") == 1 and not out.exists()
    assert "resolution=32x38 (height x width): must be multiples of 4, such as 36 or 40" in error


def test_a_lora_checkpoint_of_an_sd15_sized_model_is_small(checkpoint, tmp_path):
    """It holds weights, EMA and the optimizer's two moments: 4 times the size of the adapter."""
    config = json.loads((ASSETS / "configs" / "sd1" / "unet" / "config.json").read_text())
    rank = 16
    module = StableDiffusionModule(str(checkpoint))
    with torch.device("meta"):  # without memory for the frozen weights
        module.parts.unet = module.unet = UNet2DConditionModel.from_config(config)
    module.tuning = LoraTuning(rank=rank)
    module.tuning.prepare(module.parts, 0)
    for layer in module.unet.modules():
        for name, weight in list(layer._parameters.items()):
            if weight is not None and weight.requires_grad:
                layer._parameters[name] = torch.nn.Parameter(torch.zeros(weight.shape))
    weights = trained(module)
    assert sum(w.numel() for w in weights.values()) == 797_184 * rank // 4
    optimizer = torch.optim.AdamW([w for w in module.parameters() if w.requires_grad])
    for weight in module.parameters():
        weight.grad = torch.zeros(weight.shape) if weight.requires_grad else None
    optimizer.step()
    ema = EMA()
    ema.average = weights
    content = {"state_dict": weights, "optimizer_states": [optimizer.state_dict()], "callbacks": ema.state_dict()}
    torch.save(content, tmp_path / "lora.ckpt")
    assert (tmp_path / "lora.ckpt").stat().st_size < 60e6
