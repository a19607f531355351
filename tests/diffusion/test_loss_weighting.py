"""Every weighting agrees with its paper on a schedule small enough to compute by hand."""

from __future__ import annotations

import pytest
import torch

from sdmodule.diffusion.loss_weighting import WEIGHTINGS, loss_weights, signal_to_noise
from sdmodule.diffusion.noising import PREDICTION_TYPES, add_noise, prediction_target, signal_and_noise_rates
from sdmodule.errors import SettingsError

SCHEDULE = torch.tensor([0.9, 0.5, 0.1])  # signal-to-noise ratios 9, 1 and 1/9
STEPS = torch.arange(3)
BY_HAND = {
    ("none", "epsilon"): [1, 1, 1],
    ("none", "v_prediction"): [1, 1, 1],
    ("none", "sample"): [1, 1, 1],
    ("min_snr", "epsilon"): [5 / 9, 1, 1],
    ("min_snr", "v_prediction"): [5 / 10, 1 / 2, 1 / 10],
    ("min_snr", "sample"): [5, 1, 1 / 9],
    ("soft_min_snr", "epsilon"): [5 / 14, 5 / 6, 45 / 46],
    ("soft_min_snr", "v_prediction"): [45 / 140, 5 / 12, 45 / 460],
    ("soft_min_snr", "sample"): [45 / 14, 5 / 6, 5 / 46],
    ("debiased", "epsilon"): [1 / 3, 1, 3],
    ("debiased", "v_prediction"): [3 / 10, 1 / 2, 3 / 10],
    ("debiased", "sample"): [3, 1, 1 / 3],
}


@pytest.mark.parametrize(("weighting", "prediction_type"), BY_HAND)
def test_weights_equal_those_of_the_papers(weighting, prediction_type):
    weights = loss_weights(weighting, prediction_type, SCHEDULE, STEPS, gamma=5.0)
    torch.testing.assert_close(weights, torch.tensor(BY_HAND[weighting, prediction_type], dtype=torch.float32))


def test_every_combination_is_covered():
    assert set(BY_HAND) == {(weighting, kind) for weighting in WEIGHTINGS for kind in PREDICTION_TYPES}


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "none"])
def test_a_wrong_image_has_the_same_loss_whatever_is_predicted(weighting):
    """A wrong image implies a wrong noise and a wrong velocity; their weighted errors are equal."""
    generator = torch.Generator().manual_seed(0)
    latents, mistaken, noise = torch.randn(3, 3, 4, 8, 8, generator=generator)
    noisy = add_noise(latents, noise, SCHEDULE, STEPS)
    signal, noise_rate = signal_and_noise_rates(SCHEDULE, STEPS)
    implied = (noisy - signal * mistaken) / noise_rate  # the noise that this image would imply
    costs = []
    for kind in PREDICTION_TYPES:
        wanted = prediction_target(kind, latents, noise, SCHEDULE, STEPS)
        predicted = prediction_target(kind, mistaken, implied, SCHEDULE, STEPS)
        costs.append((predicted - wanted).square().mean(dim=(1, 2, 3)) * loss_weights(weighting, kind, SCHEDULE, STEPS))
    torch.testing.assert_close(costs[0], costs[1])
    torch.testing.assert_close(costs[0], costs[2])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_weights_are_finite_at_zero_terminal_snr(weighting, prediction_type):
    schedule = torch.tensor([0.999, 0.5, 0.0])
    weights = loss_weights(weighting, prediction_type, schedule, STEPS)
    assert weights.isfinite().all() and (weights > 0).all()
    assert signal_to_noise(schedule)[2] == signal_to_noise(schedule)[1]


def test_an_unknown_weighting_is_refused():
    with pytest.raises(SettingsError, match=r"weighting=max_snr: unknown; choose one of"):
        loss_weights("max_snr", "epsilon", SCHEDULE, STEPS)
