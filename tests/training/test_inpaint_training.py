"""Training for inpainting: the loss, the conversion, the metrics, and the export in diffusers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInpaintPipeline
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.cli.main import train_main
from sdmodule.components.inpaint_unet import convert_to_inpaint
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.inpaint import InpaintTraining
from sdmodule.training.loss import Conditions, denoising_errors, mask_channels
from sdmodule.training.objective import Noise
from sdmodule.training.step_inputs import draw_mask_inputs
from tests.fitting import fit

pytestmark = pytest.mark.slow  # most tests train


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPT = "a blue star on a white background"


def fast(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


@pytest.fixture
def build(checkpoint: Path):
    def make(**settings) -> StableDiffusionModule:
        inpaint = {"convert": True, **settings}
        return StableDiffusionModule(
            str(checkpoint), task="inpaint", optimizer=fast, sampling={"steps": 2}, training={"inpaint": inpaint}
        )

    return make


def train_on_scenes(module: StableDiffusionModule, steps: int, *callbacks, resume: Path | None = None) -> Trainer:
    data = ShapesDataModule(batch_size=2, train_length=6, val_length=2, size=32)
    return fit(module, data, steps, *callbacks, resume=resume, limit_val_batches=0)


def test_the_loss_on_nine_channels_matches_the_paper(build):
    """Ho et al. 2020, algorithm 1, written out with diffusers."""
    module = build()
    module.setup("fit")
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    batch = {"image": image, "mask": (torch.rand(2, 1, 32, 32) < 0.3).float()}
    inpaint, generator = InpaintTraining(full_mask_share=0.0), torch.Generator().manual_seed(1)
    channels = mask_channels(module.parts, batch, draw_mask_inputs(module.parts, batch, generator, inpaint))
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    conditions = Conditions(module.encode_captions([PROMPT, ""]), channels)
    errors = denoising_errors(module.parts, latents, Noise(noise, noise), timesteps, conditions)

    parts = module.parts
    posterior = parts.vae.encode(image * (batch["mask"] < 0.5)).latent_dist
    drawn = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    masked_latents = (posterior.mean + posterior.std * drawn) * parts.vae.config.scaling_factor
    small = F.interpolate(batch["mask"], size=(8, 8))
    tokens = parts.tokenizer([PROMPT, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    seen = torch.cat([parts.scheduler.add_noise(latents, noise, timesteps), small, masked_latents], dim=1)
    predicted = parts.unet(seen, timesteps, encoder_hidden_states=parts.text_encoder(tokens)[0]).sample
    wanted = ((predicted - noise) ** 2).mean(dim=1, keepdim=True)
    torch.testing.assert_close(errors, wanted, rtol=1e-6, atol=1e-7)


def test_a_converted_unet_learns_the_channels_of_the_mask(build):
    module = build()
    train_on_scenes(module, 3)
    new = module.unet.conv_in.weight[:, 4:]
    assert module.unet.config.in_channels == 9 and new.abs().max() > 0


def test_the_masked_area_can_be_weighted(build):
    def loss(weight: float) -> float:
        module = build(masked_area_weight=weight, full_mask_share=0.0)
        return train_on_scenes(module, 1).callback_metrics["train/loss"].item()

    assert loss(1.0) == loss(1.0) != loss(5.0)


def test_a_resumed_training_equals_an_uninterrupted_one(build, tmp_path):
    unbroken, resumed = build(), build()
    train_on_scenes(unbroken, 5, ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    train_on_scenes(resumed, 5, resume=tmp_path / "step=2.ckpt")
    for name, value in unbroken.unet.state_dict().items():
        assert torch.equal(resumed.unet.state_dict()[name], value)
    again = StableDiffusionModule.load_from_checkpoint(tmp_path / "step=5.ckpt", weights_only=True)
    assert torch.equal(again.unet.conv_in.weight, unbroken.unet.conv_in.weight)


def test_the_latent_cache_does_not_change_the_loss(build, tmp_path):
    plain = train_on_scenes(build(), 3).callback_metrics["train/loss"]
    cached = train_on_scenes(build(), 3, LatentCache(tmp_path)).callback_metrics["train/loss"]
    torch.testing.assert_close(cached, plain, rtol=1e-5, atol=0)


def test_a_text_to_image_unet_is_converted_only_on_request(build, checkpoint):
    with pytest.raises(SettingsError, match=r"4 channels .* training\.inpaint\.convert=true"):
        train_on_scenes(build(convert=False), 1)
    with pytest.raises(SettingsError, match="use model=inpaint"):
        StableDiffusionModule(str(checkpoint), training={"inpaint": {"convert": True}})


@pytest.mark.parametrize("settings", [{"full_mask_share": 1.5}, {"masked_area_weight": 0}, {"convert": 1}])
def test_settings_out_of_range_are_refused(build, settings):
    [(name, value)] = settings.items()
    with pytest.raises(SettingsError, match=f"training.inpaint.{name}={value}: must be"):
        build(**settings)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images, each with its own mask."""
    folder = tmp_path / "photos"
    (folder / "masks").mkdir(parents=True)
    rows = []
    for k in range(6):
        Image.new("RGB", (40, 48), (40 * k, 90, 200)).save(folder / f"{k}.png")
        mask = Image.new("L", (40, 48))
        mask.paste(255, (4 * k, 8, 4 * k + 12, 40))
        mask.save(folder / "masks" / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "text": f"image {k}", "mask_file_name": f"masks/{k}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def train(call, checkpoint, tmp_path):
    def run(*arguments: str) -> tuple[int, str]:
        settings = ["model=inpaint", f"pretrained={checkpoint}", "resolution=32", f"output_dir={tmp_path / 'out'}"]
        status, _, errors = call(train_main, *settings, *arguments)
        return status, errors

    return run


def test_masked_and_unmasked_losses_are_logged_and_diffusers_inpaints_alike_from_the_export(train, photos, tmp_path):
    settings = ["training.inpaint.convert=true", "trainer.max_steps=3", "+steps=2", "data.batch_size=2"]
    settings.append("model.optimizer.lr=1e-2")
    assert train(f"data.root={photos}", *settings) == (0, "")
    out = tmp_path / "out"
    figures = [row for row in csv.DictReader((out / "metrics.csv").open()) if row["val/loss"]]
    total, masked, unmasked = (float(figures[-1][f"val/loss{part}"]) for part in ("", "_masked_area", "_unmasked_area"))
    assert min(masked, unmasked) < total < max(masked, unmasked)
    with Image.open(out / "samples" / "000003.png") as sheet:
        assert sheet.width > 3 * 192  # original, masked original and sample side by side

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(out / "export", safety_checker=None)
    assert type(pipeline).__name__ == json.loads((out / "export" / "model_index.json").read_text())["_class_name"]
    pipeline.set_progress_bar_config(disable=True)
    image, mask = Image.open(photos / "2.png").resize((32, 32)), Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 20))
    common = {"num_inference_steps": 3, "guidance_scale": 5.0}
    theirs = pipeline(
        PROMPT, image, mask, height=32, width=32, generator=torch.Generator().manual_seed(4), **common
    ).images[0]
    sd = StableDiffusionModule.from_pretrained(str(out / "export"), task="inpaint")
    ours = sd.infer(PROMPT, image, mask, generator=torch.Generator().manual_seed(4), **common)["samples"][0]
    inside = np.asarray(mask) > 0
    assert np.array_equal(np.asarray(ours)[inside], np.asarray(theirs)[inside])


def test_a_text_to_image_checkpoint_is_refused_before_anything_is_written(train, photos, tmp_path):
    status, error = train(f"data.root={photos}", "trainer.max_steps=1")
    assert status == 1 and "training.inpaint.convert=true" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [["training.inpaint.convert=true"], ["model=text2image", "objective.masked=true"]])
def test_a_source_without_masks_is_refused_before_anything_is_written(train, photos, tmp_path, given):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(photos / "0.png", bare)
    (bare / "0.txt").write_text("an image")
    both = f"data.sources=[{{root: {photos}}}, {{root: {bare}}}]"
    status, error = train("data=mixed", both, "data.val_fraction=0", "trainer.max_steps=1", *given)
    assert status == 1 and f"{bare} has no masks" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_embedded_inpainting_model_has_nine_channels_and_shares_parts_with_tiny():
    sd = StableDiffusionModule.from_pretrained("tiny-inpaint", task="inpaint")
    assert sd.unet.config.in_channels == 9
    plain = StableDiffusionModule.from_pretrained("tiny")
    for part in ("vae", "text_encoder"):  # loaded from tiny, not shipped twice
        ours, theirs = (getattr(module.parts, part).state_dict() for module in (sd, plain))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    convert_to_inpaint(plain.unet)
    assert plain.unet.state_dict().keys() == sd.unet.state_dict().keys()
