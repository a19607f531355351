"""Training of a diffusion model: noisy latents, the target to predict from them, and the loss.

``alphas_cumprod`` ``[T]`` is the scheduler's cumulative product of alphas, the signal's share of the variance at each
timestep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmodule.errors import check_choice

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def signal_and_noise_rates(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of signal and noise at ``timesteps`` ``[B]``, each ``[B, 1, 1, 1]`` (alpha and sigma of the papers)."""
    alpha_squared = alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha_squared.sqrt(), (1.0 - alpha_squared).sqrt()


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents ``[B, C, h, w]`` at ``timesteps`` ``[B]`` (Ho et al. 2020, equation 4)."""
    signal_rate, noise_rate = signal_and_noise_rates(alphas_cumprod, timesteps)
    return signal_rate * latents + noise_rate * noise


def prediction_target(
    prediction_type: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor
) -> Tensor:
    """Target of the model's prediction, ``[B, C, h, w]``.

    ``epsilon`` is the noise (Ho et al. 2020, equation 14); ``v_prediction`` is the velocity (Salimans and Ho 2022,
    appendix D); ``sample`` is the image's latents.

    Raises:
        SettingsError: for an unknown prediction type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal_rate, noise_rate = signal_and_noise_rates(alphas_cumprod, timesteps)
        return signal_rate * noise - noise_rate * latents
    return latents


def pseudo_huber(difference: Tensor, delta: float) -> Tensor:
    """Pseudo-Huber loss of each element: squared for small errors, linear beyond about ``delta``.

    The loss of Song and Dhariwal 2023, section 3.3, scaled by ``2 * delta`` so that it equals the square of small
    errors.
    """
    return 2.0 * delta * ((difference.square() + delta**2).sqrt() - delta)


def per_example_loss(errors: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each example's errors, ``[B]``; every example counts the same, whatever its weights sum to.

    Args:
        errors: ``[B, 1, h, w]``.
        weights: of the same shape, not negative; an example whose weights are all 0 has a loss of 0.
    """
    axes = (1, 2, 3)
    return (errors * weights).sum(dim=axes) / weights.sum(dim=axes).clamp(min=1e-6)


def prior_preservation_loss(losses: Tensor, prior: Tensor, weight: float) -> Tensor:
    """DreamBooth's loss with prior preservation, a scalar (Ruiz et al. 2023, equation 2).

    Args:
        losses: loss of each example, ``[B]``.
        prior: which examples are class images rather than instance images, ``[B]``; both occur.
        weight: weight of the class images' loss, lambda in the paper.
    """
    count = len(prior) // 2
    if prior.device.type == "cpu" and prior.tolist() == [False] * count + [True] * count:  # no GPU has to be asked
        instances, others = losses.chunk(2)
    else:
        instances, others = losses[~prior], losses[prior]
    return instances.mean() + weight * others.mean()


def draw_timesteps(count: int, total: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Draw timesteps from 0 to ``total - 1``, ``[count]``.

    Args:
        count: number of timesteps to draw.
        total: number of timesteps of the schedule.
        generator: random number generator.
        shift: 1 draws uniformly; a greater value prefers noisy timesteps, which decide the layout of an image
            (Esser et al. 2024, equation 23, applied to timesteps divided by ``total``).
    """
    fraction = torch.rand(count, generator=generator)
    fraction = shift * fraction / (1.0 + (shift - 1.0) * fraction)
    return (fraction * total).long().clamp(max=total - 1)
