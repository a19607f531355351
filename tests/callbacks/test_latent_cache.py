"""Cached latents are those of the pictures, and training with them is training with the pictures."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer

from sdmodule.callbacks.latent_cache import CachedLatents, LatentCache
from sdmodule.data.image_folder import ImageFolderDataModule
from sdmodule.data.scenes import caption, render, sample_scene
from sdmodule.data.shapes import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule


def fit(checkpoint: Path, data, *callbacks: Callback, **settings) -> Trainer:
    module = StableDiffusionModule(str(checkpoint))
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )
    trainer.fit(module, data)
    return trainer


@pytest.fixture
def shapes() -> ShapesDataModule:
    return ShapesDataModule(batch_size=2, train_length=6, val_length=2, size=32)


def test_the_moments_are_those_of_the_pictures(checkpoint, module, shapes, tmp_path):
    pictures = shapes.train_set
    fit(checkpoint, shapes, LatentCache(tmp_path, batch_size=4))
    assert isinstance(shapes.train_set, CachedLatents) and len(shapes.train_set) == 6
    for k in range(6):
        cached, example = shapes.train_set[k], pictures[k]
        assert cached["caption"] == example["caption"]
        moments = module.encode_moments(example["image"][None])[0]
        assert cached["moments"].shape == (8, 8, 8)
        torch.testing.assert_close(cached["moments"].float(), moments, rtol=2e-3, atol=2e-3)


def test_the_losses_are_those_of_training_on_pictures(checkpoint, shapes, tmp_path):
    cached = fit(checkpoint, shapes, LatentCache(tmp_path)).callback_metrics
    uncached = fit(checkpoint, ShapesDataModule(batch_size=2, train_length=6, val_length=2, size=32)).callback_metrics
    assert cached["train/loss"].item() == pytest.approx(uncached["train/loss"].item(), rel=1e-2)
    assert cached["val/loss"].item() == pytest.approx(uncached["val/loss"].item(), rel=1e-2)


def test_the_file_is_small_and_plain(checkpoint, shapes, tmp_path):
    fit(checkpoint, shapes, LatentCache(tmp_path / "cache"))
    moments = np.load(tmp_path / "cache" / "moments.npy")
    assert moments.dtype == np.float16 and moments.shape == (6, 8, 8, 8)
    assert (moments[:, 4:] > 0).all(), "deviations"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(4):
        scene = sample_scene(random.Random(k))
        render(scene, 32).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(caption(scene))
    return pictures


@pytest.mark.parametrize("settings", [{"random_flip": True}, {"center_crop": False}], ids=lambda s: next(iter(s)))
def test_pictures_that_change_from_epoch_to_epoch_are_refused(checkpoint, folder, tmp_path, settings):
    data = ImageFolderDataModule(str(folder), batch_size=2, resolution=32, val_fraction=0, **settings)
    with pytest.raises(SettingsError, match=r"data\.random_flip=false and data\.center_crop=true"):
        fit(checkpoint, data, LatentCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_pictures_can_be_cached(checkpoint, folder, tmp_path):
    data = ImageFolderDataModule(str(folder), batch_size=2, resolution=32, val_fraction=0)
    trainer = fit(checkpoint, data, LatentCache(tmp_path / "cache"))
    assert trainer.global_step == 3 and np.isfinite(trainer.callback_metrics["train/loss"].item())
