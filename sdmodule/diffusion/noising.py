"""What a diffusion model is trained on: noisy latents and the target that it should predict from them.

``alphas_cumprod`` is the scheduler's table of the signal's share of the variance at each timestep, ``[T]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmodule.errors import SettingsError, choices

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def signal_and_noise_rates(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of signal and noise at ``timesteps`` ``[B]``, each ``[B, 1, 1, 1]``: alpha, sigma of Salimans and Ho."""
    alpha_squared = alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha_squared.sqrt(), (1.0 - alpha_squared).sqrt()


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents at ``timesteps`` (Ho et al. 2020, equation 4); all ``[B, C, h, w]``."""
    signal_rate, noise_rate = signal_and_noise_rates(alphas_cumprod, timesteps)
    return signal_rate * latents + noise_rate * noise


def target(prediction_type: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should predict, ``[B, C, h, w]``.

    ``epsilon`` is the noise (Ho et al. 2020, equation 14); ``v_prediction`` is the velocity of Salimans and Ho 2022,
    appendix D; ``sample`` is the image's latents.

    Raises:
        SettingsError: for another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal_rate, noise_rate = signal_and_noise_rates(alphas_cumprod, timesteps)
        return signal_rate * noise - noise_rate * latents
    if prediction_type == "sample":
        return latents
    raise SettingsError(
        f"prediction_type={prediction_type} cannot be trained; give one of {choices(PREDICTION_TYPES)}."
    )


def pseudo_huber(difference: Tensor, delta: float) -> Tensor:
    """Squared error that grows linearly from about ``delta`` on, of the same shape.

    The loss of Song and Dhariwal 2023, section 3.3, scaled by ``2 * delta`` so that small errors count as squares.
    """
    return 2.0 * delta * ((difference.square() + delta**2).sqrt() - delta)


def per_example_loss(errors: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of each example, ``[B]``, so that an example counts the same however it is weighted.

    Args:
        errors: ``[B, 1, h, w]``.
        weights: of the same shape, 0 or more; an example without any counts as no error.
    """
    axes = (1, 2, 3)
    return (errors * weights).sum(dim=axes) / weights.sum(dim=axes).clamp(min=1e-6)


def prior_preservation_loss(losses: Tensor, prior: Tensor, weight: float) -> Tensor:
    """The loss of DreamBooth, a scalar (Ruiz et al. 2023, equation 2).

    Args:
        losses: of each example, ``[B]``.
        prior: which examples show the kind and not the thing, ``[B]``; both occur.
        weight: how much the kind counts beside the thing.
    """
    return losses[~prior].mean() + weight * losses[prior].mean()


def draw_timesteps(count: int, total: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Draw ``count`` timesteps of ``total``, ``[count]``.

    Args:
        count: how many.
        total: number of timesteps of the schedule.
        generator: source of the draw.
        shift: 1 draws uniformly; a greater value prefers noisy timesteps, where the layout of an image is decided
            (Esser et al. 2024, equation 23, applied to the share of all timesteps).
    """
    share = torch.rand(count, generator=generator)
    share = shift * share / (1.0 + (shift - 1.0) * share)
    return (share * total).long().clamp(max=total - 1)
