"""The training objective: noise, weighting, loss, and the exported schedule."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from sdmodule.diffusion.loss_weighting import WEIGHTINGS
from sdmodule.diffusion.noising import PREDICTION_TYPES, prediction_target, pseudo_huber
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.loss import Conditions, denoising_errors, spatial_loss_weights
from sdmodule.training.objective import SQUARED_ERROR, Objective

LATENTS = torch.zeros(2, 4, 32, 32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_standard_normal_by_default():
    noise, added = SQUARED_ERROR.draw_noise(LATENTS, generator())
    assert torch.equal(noise, torch.randn(LATENTS.shape, generator=generator())) and torch.equal(noise, added)


def test_a_noise_offset_shifts_each_channel_by_a_constant():
    plain, _ = SQUARED_ERROR.draw_noise(LATENTS, generator())
    noise, added = Objective(noise_offset=0.5).draw_noise(LATENTS, generator())
    moved = noise - plain
    torch.testing.assert_close(moved, moved[..., :1, :1].expand_as(moved), rtol=0, atol=1e-5)
    assert moved.std() > 0.2 and torch.equal(noise, added)


def test_input_perturbation_adds_noise_that_the_target_leaves_out():
    plain, _ = SQUARED_ERROR.draw_noise(LATENTS, generator())
    noise, added = Objective(input_perturbation=0.1).draw_noise(LATENTS, generator())
    assert torch.equal(noise, plain)
    torch.testing.assert_close((added - noise).std(), torch.tensor(0.1), rtol=0.05, atol=0)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    near, far = torch.tensor([1e-3]), torch.tensor([1e3, 2e3])
    torch.testing.assert_close(pseudo_huber(near, 0.1), near.square(), rtol=1e-3, atol=0)
    line = pseudo_huber(far, 0.1)
    torch.testing.assert_close(line[1] - line[0], torch.tensor(2 * 0.1 * 1e3), rtol=1e-3, atol=0)


COMBINATIONS = [
    dict(zip(("prediction_type", "zero_terminal_snr", "weighting"), values, strict=True))
    for values in product(PREDICTION_TYPES, (False, True), WEIGHTINGS)
    if values[:2] != ("epsilon", True)
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_combination_trains_with_a_finite_loss(checkpoint, settings):
    sd = StableDiffusionModule(str(checkpoint), objective={**settings, "huber_delta": 0.1, "noise_offset": 0.05})
    latents = torch.randn(4, 4, 8, 8, generator=generator())
    timesteps = torch.tensor([0, 1, 500, 999])
    noise = sd.objective.draw_noise(latents, generator(1))
    conditions = Conditions(sd.encode_captions(["a star"] * 4))
    errors = denoising_errors(sd.parts, latents, noise, timesteps, conditions, sd.objective)
    errors.mean().backward()
    assert errors.isfinite().all() and sd.unet.conv_in.weight.grad.isfinite().all()


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_every_combination_matches_its_closed_form(settings):
    """Latents of 2 and noise of 1, for which the model predicts 0, at three noise levels."""
    kind, zero, weighting = settings.values()
    # alphas_cumprod of 0.9, 0.5 and 0.1; Lin et al. 2023, algorithm 1, shifts the last root to 0 and keeps the first
    signals = [0.9**0.5, (0.5**0.5 - 0.1**0.5) * 3 / 2, 0.0] if zero else [0.9**0.5, 0.5**0.5, 0.1**0.5]
    schedule = torch.tensor(signals).square()
    expected = []
    for signal in signals:
        share = signal**2
        wanted = {"epsilon": 1.0, "v_prediction": signal - 2 * (1 - share) ** 0.5, "sample": 2.0}[kind]
        snr = (
            share / (1 - share) if share else signals[1] ** 2 / (1 - signals[1] ** 2)
        )  # at zero SNR: that of the step before
        sample_weight = {"min_snr": min(snr, 5), "soft_min_snr": 5 * snr / (snr + 5), "debiased": snr**0.5}
        scale = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": 1.0}[kind]
        expected.append(wanted**2 * (1.0 if weighting == "none" else sample_weight[weighting] * scale))

    latents, noise, steps = torch.full((3, 4, 2, 2), 2.0), torch.ones(3, 4, 2, 2), torch.arange(3)
    objective = Objective(**settings)
    errors = objective.errors(
        torch.zeros_like(latents), prediction_target(kind, latents, noise, schedule, steps), kind, schedule, steps
    )
    torch.testing.assert_close(errors, torch.tensor(expected).view(3, 1, 1, 1).expand(3, 1, 2, 2))


def test_the_zero_terminal_snr_schedule_matches_the_paper(checkpoint):
    """Lin et al. 2023, algorithm 1: shift the square roots to end at 0, then scale them to keep the first."""
    plain = StableDiffusionModule(str(checkpoint)).parts.scheduler.alphas_cumprod.double().sqrt()
    ours = StableDiffusionModule(
        str(checkpoint), objective={"prediction_type": "v_prediction", "zero_terminal_snr": True}
    ).parts.scheduler.alphas_cumprod
    wanted = ((plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])).square()
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-6)
    assert ours[-1] == 0


def test_a_masked_loss_counts_only_where_the_mask_is_white():
    objective = Objective(masked=True)
    errors = torch.rand(2, 1, 8, 8, generator=generator())
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, :16] = 1
    weights = spatial_loss_weights(errors, {"mask": mask}, None, objective)
    assert torch.equal(weights[:, :, :4], torch.ones(2, 1, 4, 8)) and not weights[:, :, 4:].any()
    with pytest.raises(SettingsError, match=r"objective\.masked=true: the data has no masks"):
        spatial_loss_weights(errors, {}, None, objective)


def test_the_export_keeps_prediction_type_and_schedule(checkpoint, tmp_path):
    objective = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    sd = StableDiffusionModule(str(checkpoint), objective=objective, sampling={"steps": 2, "scheduler": "euler"})
    assert sd.parts.scheduler.alphas_cumprod[-1] == 0
    sd.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["timestep_spacing"]) == ("v_prediction", "trailing")
    assert config["rescale_betas_zero_snr"] is True
    metadata = StableDiffusionModule.from_pretrained(str(tmp_path)).infer("a star", num_inference_steps=2)["metadata"]
    assert metadata["guidance_rescale"] == 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type=flow: unknown; choose one of epsilon"),
        ({"weighting": "snr"}, "weighting=snr: unknown; choose one of debiased"),
        ({"snr_gamma": 0}, "snr_gamma=0: must be a number greater than 0"),
        ({"noise_offset": -1}, "noise_offset=-1: must be a number of at least 0"),
        ({"input_perturbation": "much"}, "input_perturbation=much: must be a number of at least 0"),
        ({"huber_delta": 0}, "huber_delta=0: must be a number greater than 0"),
        ({"masked": 1}, "masked=1: must be true or false"),
        ({"zero_terminal_snr": True}, "set objective.prediction_type=v_prediction"),
    ],
)
def test_bad_objectives_are_named_in_the_error(checkpoint: Path, settings, message):
    with pytest.raises(SettingsError, match=message):
        StableDiffusionModule(str(checkpoint), objective=settings)
