"""How much each noise level counts in the loss.

The papers weigh the error of the predicted image. A weight ``w`` of that is ``w / SNR`` of the error of predicted
noise and ``w / (SNR + 1)`` of that of predicted velocity (Salimans and Ho 2022, appendix D; Hang et al. 2023, section
3.4), where SNR is the signal-to-noise ratio ``alphas_cumprod / (1 - alphas_cumprod)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmodule.errors import SettingsError, choices

WEIGHTINGS = ("none", "min_snr", "soft_min_snr", "debiased")


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """SNR of every timestep, ``[T]``; of one without any signal, the least that any other has.

    A weight that grows without bound as the signal vanishes then stays finite for zero terminal SNR.
    """
    snr = alphas_cumprod / (1.0 - alphas_cumprod)
    return snr.clamp(min=snr[snr > 0].min())


def loss_weights(
    weighting: str, prediction_type: str, alphas_cumprod: Tensor, timesteps: Tensor, gamma: float = 5.0
) -> Tensor:
    """Weights of the squared error of what a model predicts, ``[B]``.

    ``min_snr`` is ``min(SNR, gamma)`` on the image (Hang et al. 2023, section 3.4); ``soft_min_snr`` is its smooth
    form ``SNR * gamma / (SNR + gamma)`` (Crowson et al. 2024, section 4.4); ``debiased`` is ``sqrt(SNR)`` (Yu et al.
    2023, equation 13, which has ``1 / sqrt(SNR)`` on the noise). ``none`` weighs what is predicted alike everywhere.

    Args:
        weighting: one of :data:`WEIGHTINGS`.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        alphas_cumprod: the schedule, ``[T]``.
        timesteps: ``[B]``.
        gamma: the SNR from which on the first two hold the weight back.

    Raises:
        SettingsError: for another weighting.
    """
    if weighting == "none":
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = signal_to_noise(alphas_cumprod).to(timesteps.device)[timesteps]
    if weighting == "min_snr":
        weights = snr.clamp(max=gamma)
    elif weighting == "soft_min_snr":
        weights = snr * gamma / (snr + gamma)
    elif weighting == "debiased":
        weights = snr.sqrt()
    else:
        raise SettingsError(f"objective.weighting={weighting} is not known; give one of {choices(WEIGHTINGS)}.")
    if prediction_type == "epsilon":
        return weights / snr
    return weights / (snr + 1.0) if prediction_type == "v_prediction" else weights
