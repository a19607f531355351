"""An autoencoder learns to reconstruct images, and is exported as a part of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from sdmodule.components.checkpoint import load_components, load_part
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.training.autoencoder import AutoencoderModule, edge_error


def fit(checkpoint: Path, steps: int, decoder_only: bool = False, **settings) -> tuple[AutoencoderModule, Trainer]:
    torch.manual_seed(0)
    own = {"decoder_only": decoder_only, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2)}
    module = AutoencoderModule(str(checkpoint), **own)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )
    trainer.fit(module, ShapesDataModule(batch_size=4, train_length=1000, val_length=4, size=32))
    return module, trainer


def test_losses_match_diffusers(checkpoint):
    module = AutoencoderModule(str(checkpoint))
    image = torch.zeros(2, 3, 32, 32)
    losses = module.losses(image, torch.Generator().manual_seed(0))
    assert losses["kl"] > 0 and losses["l1"] ** 2 <= losses["mse"]
    posterior = module.vae.encode(image).latent_dist
    per_value = posterior.kl().mean() / posterior.mean[0].numel()  # diffusers sums over the latents of an image
    torch.testing.assert_close(losses["kl"], per_value)


def test_the_edge_loss_compares_neighbouring_pixels():
    """A constant error has no edges; a step of 2 counts at one of three places along one of two axes."""
    error = torch.ones(1, 3, 4, 4)
    assert edge_error(error) == 0
    error[..., 2:] = 3
    assert edge_error(error) == pytest.approx(0.5 * 2 / 3)


@pytest.mark.slow
def test_images_come_back_better_after_training(checkpoint):
    settings = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}
    before = fit(checkpoint, 1, val_check_interval=1, **settings)[1].callback_metrics["val/psnr"]
    after = fit(checkpoint, 120, val_check_interval=120, **settings)[1].callback_metrics["val/psnr"]
    assert after > before + 1.5


def test_the_exported_scaling_factor_gives_latents_unit_variance(checkpoint, tmp_path):
    module, trainer = fit(checkpoint, 2, limit_val_batches=1, val_check_interval=2)
    module.save_pretrained(tmp_path)
    vae = load_part("vae", str(tmp_path / "vae"))
    images = torch.stack([trainer.datamodule.val_set[k]["image"] for k in range(4)])
    latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    assert latents.square().mean().item() == pytest.approx(1.0, abs=1e-3)


def test_the_export_can_replace_the_vae_of_a_checkpoint(checkpoint, tmp_path):
    module = AutoencoderModule(str(checkpoint), scratch=["vae"])
    module.save_pretrained(tmp_path)
    parts = load_components(str(checkpoint), components={"vae": str(tmp_path / "vae")})
    assert torch.equal(parts.vae.decoder.conv_in.weight, module.vae.decoder.conv_in.weight)
    old = load_part("vae", str(checkpoint))
    assert not torch.equal(parts.vae.decoder.conv_in.weight, old.decoder.conv_in.weight)
    assert parts.vae.config.scaling_factor == old.config.scaling_factor


def test_a_decoder_alone_learns_and_latents_stay(checkpoint, tmp_path):
    module, _ = fit(checkpoint, 2, decoder_only=True, limit_val_batches=1, val_check_interval=1)
    module.save_pretrained(tmp_path)
    ours, before = load_part("vae", str(tmp_path / "vae")), load_part("vae", str(checkpoint))
    assert ours.config.scaling_factor == before.config.scaling_factor
    image, latents = torch.rand(1, 3, 32, 32), torch.randn(1, 4, 16, 16)
    assert torch.equal(ours.encode(image).latent_dist.mode(), before.encode(image).latent_dist.mode())
    assert not torch.equal(ours.decode(latents).sample, before.decode(latents).sample)


@pytest.mark.parametrize("name", ["l1_weight", "edge_weight", "kl_weight"])
def test_a_weight_that_would_reward_an_error_is_refused(checkpoint, name):
    with pytest.raises(SettingsError, match=rf"model.{name}=-1: must be a number of at least 0"):
        AutoencoderModule(str(checkpoint), **{name: -1})


def test_a_decoder_alone_needs_an_encoder(checkpoint):
    with pytest.raises(SettingsError, match=r"model.decoder_only=true: keeps the encoder, but scratch"):
        AutoencoderModule(str(checkpoint), scratch=["vae"], decoder_only=True)


def test_the_module_loads_from_its_checkpoint(checkpoint, tmp_path):
    module, trainer = fit(checkpoint, 1, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = AutoencoderModule.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(again.vae.decoder.conv_in.weight, module.vae.decoder.conv_in.weight)


def test_validation_does_not_change_training(checkpoint):
    without, _ = fit(checkpoint, 3, limit_val_batches=0)
    with_validation, _ = fit(checkpoint, 3, limit_val_batches=1, val_check_interval=1)
    assert torch.equal(without.vae.decoder.conv_in.weight, with_validation.vae.decoder.conv_in.weight)
