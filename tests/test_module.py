"""Training changes only what is trained, is repeatable, resumes at every step, and its checkpoints load."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sdmodule.callbacks.ema import EMA
from sdmodule.callbacks.validation_samples import ValidationSamples
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.sampling.infer import evaluating
from tests.fitting import fit


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


VELOCITY = {"prediction_type": "v_prediction", "zero_terminal_snr": True}


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def train(
    module: StableDiffusionModule, steps: int, *callbacks: Callback, resume: Path | None = None, **settings
) -> Trainer:
    """Train on epochs of six images, two per step, so that a few steps cross the end of an epoch."""
    data = ShapesDataModule(batch_size=2, train_length=6, val_length=2, size=32)
    return fit(module, data, steps, *callbacks, resume=resume, **{"limit_val_batches": 0, **settings})


def weights(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in part.state_dict().items()}


def equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


WITH_TEXT_ENCODER = {"text_encoder": True}
"""Train the text encoder too."""


@pytest.fixture
def build(checkpoint: Path):
    """Build a module that learns fast enough for two steps to show."""

    def make(**settings) -> StableDiffusionModule:
        return StableDiffusionModule(str(checkpoint), optimizer=fast, sampling={"steps": 2}, **settings)

    return make


def fast(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


# ------------------------------------------------------------------------------------------ trained parts


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_only_trained_parts_change(build, train_text_encoder):
    module, losses = build(tuning={"text_encoder": train_text_encoder}), Losses()
    before = {name: weights(getattr(module, name)) for name in ("unet", "vae", "text_encoder")}
    train(module, 2, losses)
    assert len(losses.values) == 2 and np.isfinite(losses.values).all()
    changed = {name for name in before if not equal(before[name], weights(getattr(module, name)))}
    assert changed == ({"unet", "text_encoder"} if train_text_encoder else {"unet"})


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, VELOCITY], ids=["epsilon", "v_prediction"])
def test_the_loss_falls(build, objective):
    module, losses = build(objective=objective), Losses()
    train(module, 40, losses)
    assert np.mean(losses.values[-15:]) < 0.9 * np.mean(losses.values[:15])


def test_prediction_types_have_different_losses(build):
    epsilon, velocity = Losses(), Losses()
    train(build(), 1, epsilon)
    train(build(objective=VELOCITY), 1, velocity)
    assert epsilon.values != velocity.values


def test_dropped_captions_are_empty(build):
    always, never = (build(objective={"caption_dropout": share}) for share in (1.0, 0.0))
    losses = []
    for module in (always, never):
        batches = [
            {"image": torch.zeros(2, 3, 32, 32), "caption": captions} for captions in (["a red star"] * 2, [""] * 2)
        ]
        losses.append([module.training_step(batch, 0).item() for batch in batches])
    assert losses[0][0] == losses[0][1] == losses[1][1] != losses[1][0]


def test_a_learning_rate_schedule_is_stepped_every_step(checkpoint):
    module = StableDiffusionModule(
        str(checkpoint), optimizer=fast, lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)
    )
    trainer = train(module, 3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 8)


# ------------------------------------------------------------------------------------------ repeatability


def test_training_depends_on_its_seed_alone(build):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))  # the global random state must not matter
        module = build(training={"seed": seed})
        train(module, 2)
        results.append(weights(module.unet))
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(build, tmp_path):
    uninterrupted = build(tuning=WITH_TEXT_ENCODER)
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    train(uninterrupted, 7, every_step)
    for stop, where in ((3, "at the end of an epoch"), (4, "within an epoch")):
        resumed = build(tuning=WITH_TEXT_ENCODER)
        train(resumed, 7, resume=tmp_path / f"step={stop}.ckpt")
        assert equal(weights(resumed), weights(uninterrupted)), where


@pytest.mark.slow
def test_validation_ema_and_samples_do_not_change_training(build, tmp_path):
    without, with_validation = build(), build()
    train(without, 4)
    samples = ValidationSamples(tmp_path)
    settings = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 1}
    trainer = train(with_validation, 4, EMA(start_step=2), samples, **settings)
    assert equal(weights(with_validation), weights(without))
    ranges = [f"val/loss_{start}_{start + 249}" for start in (0, 250, 500, 750)]
    parts = [trainer.callback_metrics[name] for name in ranges]
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], torch.stack(parts).mean())
    assert all(loss > 0 for loss in parts)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{step:06d}.png" for step in (1, 2, 3, 4)]


def test_sampling_restores_the_training_mode(build):
    module = build(tuning=WITH_TEXT_ENCODER).train()
    module.vae.eval()
    modes = [part.training for part in module.modules()]
    networks = [module.unet, module.vae, module.text_encoder]
    with pytest.raises(KeyError), evaluating(module.parts):
        assert not any(part.training for network in networks for part in network.modules())
        raise KeyError
    module.infer("a red star")
    assert [part.training for part in module.modules()] == modes


# ------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def saved(build, tmp_path: Path) -> tuple[StableDiffusionModule, Path]:
    """A module trained for two steps, and its checkpoint."""
    module = build(tuning=WITH_TEXT_ENCODER)
    train(module, 2).save_checkpoint(tmp_path / "two.ckpt")
    return module, tmp_path / "two.ckpt"


def test_a_checkpoint_holds_trained_weights_and_plain_types_only(saved, checkpoint):
    module, file = saved
    content = torch.load(file, weights_only=True)
    assert set(content["state_dict"]) == {name for name, value in module.named_parameters() if value.requires_grad}
    assert {name.split(".")[0] for name in content["state_dict"]} == {"unet", "text_encoder"}
    assert content["base_model"]["name"] == str(checkpoint)
    assert sorted(content["base_model"]["fingerprints"]) == ["text_encoder", "unet", "vae"]


def test_the_module_loads_from_its_checkpoint(saved):
    module, file = saved
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = StableDiffusionModule.load_from_checkpoint(file, weights_only=True)
    assert [one for one in caught if "keys" in str(one.message)] == []
    assert equal(weights(again), weights(module))
    assert again.sampling == module.sampling and again.tuning == module.tuning
    settings = {"prompt": "a red star", "return_type": "numpy"}
    np.testing.assert_allclose(again.infer(**settings)["samples"], module.infer(**settings)["samples"], atol=1 / 255)


@pytest.mark.slow
def test_resuming_on_a_copy_of_the_base_model_works(saved, checkpoint, tmp_path):
    _, file = saved
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    resumed, uninterrupted = (StableDiffusionModule(str(base), tuning=WITH_TEXT_ENCODER) for base in (copy, checkpoint))
    for module in (resumed, uninterrupted):
        train(module, 3, resume=file)
    assert equal(weights(resumed), weights(uninterrupted))


def with_other_weights(checkpoint: Path, part: str, folder: Path) -> Path:
    """A copy of the checkpoint of which one weight differs."""
    other = StableDiffusionModule(str(checkpoint))
    with torch.no_grad():
        next(getattr(other, part).parameters()).flatten()[0] += 1e-3
    other.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_resuming_on_a_base_model_with_other_weights_is_refused(saved, checkpoint, tmp_path):
    _, file = saved
    for part in ("unet", "vae", "text_encoder"):
        other = with_other_weights(checkpoint, part, tmp_path / f"other {part}")
        words = rf"pretrained=.*other {part}: the weights of {part} differ .*pretrained={checkpoint},"
        with pytest.raises(SettingsError, match=words):
            train(StableDiffusionModule(str(other), tuning=WITH_TEXT_ENCODER), 3, resume=file)


@pytest.mark.slow
def test_a_base_model_whose_weights_have_changed_since_is_refused(checkpoint, tmp_path):
    mine = shutil.copytree(checkpoint, tmp_path / "mine")
    train(StableDiffusionModule(str(mine)), 1).save_checkpoint(tmp_path / "mine.ckpt")
    for part in ("unet", "vae", "text_encoder"):
        shutil.rmtree(mine)
        with_other_weights(checkpoint, part, mine)
        words = rf"the weights of {part} differ .*; give that base model"
        with pytest.raises(SettingsError, match=words):
            train(StableDiffusionModule(str(mine)), 2, resume=tmp_path / "mine.ckpt")
        with pytest.raises(SettingsError, match=words):
            StableDiffusionModule.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)


def test_training_from_scratch_resumes_without_base_weights(build, tmp_path):
    train(build(training={"scratch": ["unet"]}), 2).save_checkpoint(tmp_path / "two.ckpt")
    train(build(training={"scratch": ["unet"]}), 3, resume=tmp_path / "two.ckpt")
    StableDiffusionModule.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)


def test_a_checkpoint_without_its_base_model_is_refused(saved, build):
    _, file = saved
    content = torch.load(file, weights_only=True)
    torch.save(content | {"base_model": "tiny"}, file)
    with pytest.raises(SettingsError, match="does not say which base model"):
        train(build(tuning=WITH_TEXT_ENCODER), 3, resume=file)


def test_lightnings_own_checkpoint_callback_saves_trained_weights_only(build, tmp_path):
    train(build(), 2, ModelCheckpoint(tmp_path, save_last=True))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in content["state_dict"]} == {"unet"}


def test_settings_are_checked_before_the_checkpoint_is_loaded():
    with pytest.raises(SettingsError, match="steps=0"):
        StableDiffusionModule("nowhere", sampling={"steps": 0})


# ------------------------------------------------------------------------------------------ global state


def test_a_training_step_leaves_global_random_state_alone(module):
    before = torch.get_rng_state(), random.getstate()
    module.training_step({"image": torch.zeros(2, 3, 32, 32), "caption": ["a red star"] * 2}, 0)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_module_that_sampled_still_trains_with_dropout(checkpoint):
    module = StableDiffusionModule.from_pretrained(str(checkpoint), tuning={"kind": "lora", "dropout": 0.5})
    dropouts = [part for part in module.unet.modules() if isinstance(part, torch.nn.Dropout) and part.p == 0.5]
    assert dropouts and all(part.training for part in dropouts)
    images = [module.infer("a", num_inference_steps=1, return_type="tensor")["samples"] for _ in range(2)]
    assert torch.equal(*images) and all(part.training for part in dropouts)
