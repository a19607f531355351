"""Weights of the loss by noise level.

The papers weight the error of the predicted image. A weight ``w`` of that error equals a weight ``w / SNR`` of the
error of the noise and ``w / (SNR + 1)`` of that of the velocity (Salimans and Ho 2022, appendix D; Hang et al. 2023,
section 3.4), where SNR is the signal-to-noise ratio ``alphas_cumprod / (1 - alphas_cumprod)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmodule.errors import check_choice

WEIGHTINGS = ("none", "min_snr", "soft_min_snr", "debiased")


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio of every timestep, ``[T]``.

    A timestep without signal (zero terminal SNR) gets the smallest ratio of the others, which keeps weights such as
    ``1 / sqrt(SNR)`` finite.
    """
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    return snr.clamp(min=torch.where(snr > 0, snr, torch.inf).min())  # of GPUs no value is waited for


def loss_weights(
    weighting: str, prediction_type: str, alphas_cumprod: Tensor, timesteps: Tensor, gamma: float = 5.0
) -> Tensor:
    """Weights of the squared error of a model's prediction, ``[B]``.

    ``min_snr`` is ``min(SNR, gamma)`` on the image (Hang et al. 2023, section 3.4); ``soft_min_snr`` is its smooth
    form ``SNR * gamma / (SNR + gamma)`` (Crowson et al. 2024, section 4.4); ``debiased`` is ``sqrt(SNR)`` (Yu et al.
    2023, equation 13, which has ``1 / sqrt(SNR)`` on the noise). ``none`` is 1, whatever the model predicts.

    Args:
        weighting: one of `WEIGHTINGS`.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        alphas_cumprod: the schedule, ``[T]``.
        timesteps: ``[B]``.
        gamma: the SNR above which ``min_snr`` and ``soft_min_snr`` limit the weight.

    Raises:
        SettingsError: for an unknown weighting.
    """
    check_choice("objective.weighting", weighting, WEIGHTINGS)
    if weighting == "none":
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = signal_to_noise(alphas_cumprod).to(timesteps.device)[timesteps]
    if weighting == "min_snr":
        weights = snr.clamp(max=gamma)
    elif weighting == "soft_min_snr":
        weights = snr * gamma / (snr + gamma)
    else:
        weights = snr.sqrt()
    if prediction_type == "epsilon":
        return weights / snr
    return weights / (snr + 1.0) if prediction_type == "v_prediction" else weights
