"""Noisy latents and targets equal those of diffusers' DDPM, which follows the papers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from sdmodule.diffusion.noising import PREDICTION_TYPES, add_noise, draw_timesteps, per_example_loss, prediction_target
from sdmodule.errors import SettingsError

SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TIMESTEPS = torch.tensor([0, 1, 500, 999])


@pytest.fixture
def latents_and_noise() -> torch.Tensor:
    return torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_noise_is_added_as_in_diffusers(latents_and_noise):
    latents, noise = latents_and_noise
    noisy = add_noise(latents, noise, SCHEDULE.alphas_cumprod, TIMESTEPS)
    torch.testing.assert_close(noisy, SCHEDULE.add_noise(latents, noise, TIMESTEPS))


def test_epsilon_is_the_noise(latents_and_noise):
    latents, noise = latents_and_noise
    assert torch.equal(prediction_target("epsilon", latents, noise, SCHEDULE.alphas_cumprod, TIMESTEPS), noise)


def test_velocity_equals_that_of_diffusers(latents_and_noise):
    latents, noise = latents_and_noise
    velocity = prediction_target("v_prediction", latents, noise, SCHEDULE.alphas_cumprod, TIMESTEPS)
    torch.testing.assert_close(velocity, SCHEDULE.get_velocity(latents, noise, TIMESTEPS))


def test_sample_is_the_latents(latents_and_noise):
    latents, noise = latents_and_noise
    assert torch.equal(prediction_target("sample", latents, noise, SCHEDULE.alphas_cumprod, TIMESTEPS), latents)


def test_at_zero_terminal_snr_the_input_is_noise_and_the_target_the_negated_latents(latents_and_noise):
    latents, noise = latents_and_noise
    zero_snr = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod
    last = torch.full((4,), 999)
    torch.testing.assert_close(add_noise(latents, noise, zero_snr, last), noise, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        prediction_target("v_prediction", latents, noise, zero_snr, last), -latents, rtol=0, atol=1e-3
    )


def test_an_unknown_prediction_type_is_refused(latents_and_noise):
    with pytest.raises(SettingsError, match="prediction_type=flow: unknown") as error:
        prediction_target("flow", *latents_and_noise, SCHEDULE.alphas_cumprod, TIMESTEPS)
    assert all(name in str(error.value) for name in PREDICTION_TYPES)


def test_timesteps_are_drawn_uniformly():
    timesteps = draw_timesteps(20_000, 1000, torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.int64 and timesteps.min() == 0 and timesteps.max() == 999
    shares = timesteps.float().histc(bins=10, min=0, max=1000) / len(timesteps)
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.01)


def test_shift_prefers_noisy_timesteps_and_stays_in_range():
    shifts = (0.5, 1.0, 2.0, 4.0)
    draws = [draw_timesteps(5_000, 1000, torch.Generator().manual_seed(0), shift) for shift in shifts]
    means = [timesteps.float().mean() for timesteps in draws]
    assert means == sorted(means) and means[3] > means[1] + 200
    assert all(0 <= timesteps.min() and timesteps.max() <= 999 for timesteps in draws)
    # the middle of the draw lands on shift / (1 + shift) of the schedule
    torch.testing.assert_close(draws[2].float().median(), torch.tensor(2 / 3 * 1000), rtol=0, atol=15)


def test_every_example_counts_the_same_whatever_its_weights():
    errors, weights = torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    errors[0, :, :2] = 3.0
    torch.testing.assert_close(per_example_loss(errors, weights).mean(), errors.mean())
    weights[0, :, :2] = 3.0  # (3 * 3 + 1) / 4 in the first example, 1 in the second
    torch.testing.assert_close(per_example_loss(errors, weights).mean(), torch.tensor(1.75))
