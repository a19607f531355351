"""The settings of the training objective, checked, and the loss that they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdmodule.diffusion.loss_weighting import WEIGHTINGS, loss_weights
from sdmodule.diffusion.noising import PREDICTION_TYPES, pseudo_huber
from sdmodule.errors import SettingsError, choices
from sdmodule.ranges import check_flag


@dataclass(frozen=True)
class Objective:
    """What the UNet is trained to predict, and what counts as an error.

    Args:
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``; the checkpoint's own if None.
        zero_terminal_snr: scale the noise schedule so that the last timestep is noise alone, and sample with trailing
            timesteps (Lin et al. 2023, algorithm 1 and section 3.3).
        weighting: how much each noise level counts: ``none``, ``min_snr``, ``soft_min_snr`` or ``debiased``.
        snr_gamma: where ``min_snr`` and ``soft_min_snr`` hold the weight back.
        noise_offset: deviation of a constant that is added to each channel's noise, which lets a model learn very dark
            and very bright images (Guttenberg 2023, "Diffusion with Offset Noise").
        input_perturbation: share of more noise in what the UNet sees, but not in what it should predict (Ning et al.
            2023, algorithm 1).
        huber_delta: error from which on the loss grows linearly (pseudo-Huber, Song and Dhariwal 2023, section 3.3);
            None is the squared error.
        masked: count the loss only where the mask of the data is white.

    Raises:
        SettingsError: for a value out of range, and for predicted noise where there is no signal.
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    weighting: str = "none"
    snr_gamma: float = 5.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    huber_delta: float | None = None
    masked: bool = False

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise SettingsError(
                f"objective.prediction_type={self.prediction_type} is not known; "
                f"give one of {choices(PREDICTION_TYPES)}."
            )
        if self.weighting not in WEIGHTINGS:
            raise SettingsError(
                f"objective.weighting={self.weighting} is not known; give one of {choices(WEIGHTINGS)}."
            )
        for name in ("zero_terminal_snr", "masked"):
            check_flag(f"objective.{name}", getattr(self, name))
        for name in ("snr_gamma", "huber_delta"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0) and not (value is None and name == "huber_delta"):
                raise SettingsError(f"objective.{name}={value} is not allowed; give a number over 0.")
        for name in ("noise_offset", "input_perturbation"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingsError(f"objective.{name}={getattr(self, name)} is not allowed; give a number, 0 or more.")

    def schedule(self, config: dict[str, Any]) -> dict[str, Any]:
        """Settings of a scheduler that is trained and sampled with this objective, on top of a checkpoint's.

        Raises:
            SettingsError: if noise should be predicted where there is nothing else.
        """
        changes: dict[str, Any] = {}
        if self.prediction_type is not None:
            changes["prediction_type"] = self.prediction_type
        if self.zero_terminal_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        zero = changes.get("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr", False))
        if changes and zero and {**config, **changes}.get("prediction_type", "epsilon") == "epsilon":
            raise SettingsError(
                "objective.zero_terminal_snr=true with prediction_type=epsilon asks nothing of the image where there "
                "is noise alone; set objective.prediction_type=v_prediction."
            )
        return changes

    def draw_noise(self, latents: Tensor, generator: torch.Generator | list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Noise to be predicted and noise to be seen, both ``[B, C, h, w]``; the same unless the input is perturbed.

        Args:
            latents: of the images, of that shape.
            generator: source of the noise, one for all examples or one for each.
        """
        noise = randn_tensor(latents.shape, generator=generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * randn_tensor((*latents.shape[:2], 1, 1), generator=generator)
        if not self.input_perturbation:
            return noise.to(latents), noise.to(latents)
        more = randn_tensor(latents.shape, generator=generator)
        return noise.to(latents), (noise + self.input_perturbation * more).to(latents)

    def masking(self, weights: Tensor, masks: Tensor | None) -> Tensor:
        """Weights of places where only what is under a mask counts, if that is asked for.

        Args:
            weights: at the size of the latents, ``[B, 1, h, w]``.
            masks: of the data, ``[B, 1, H, W]``, 1 where the loss counts.

        Returns:
            Of the shape of ``weights``.

        Raises:
            SettingsError: if the loss should be masked and the data has no masks.
        """
        if not self.masked:
            return weights
        if masks is None:
            raise SettingsError(
                "objective.masked=true and the data has no masks; name them in a column mask_file_name of its metadata."
            )
        return weights * F.interpolate(masks.to(weights), size=weights.shape[-2:], mode="area")

    def errors(
        self, predicted: Tensor, wanted: Tensor, prediction_type: str, alphas_cumprod: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Weighted error of each place, the mean over channels: ``[B, 1, h, w]``."""
        difference = predicted.float() - wanted.float()
        errors = difference.square() if self.huber_delta is None else pseudo_huber(difference, self.huber_delta)
        weights = loss_weights(self.weighting, prediction_type, alphas_cumprod, timesteps, self.snr_gamma)
        return errors.mean(dim=1, keepdim=True) * weights.view(-1, 1, 1, 1)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


SQUARED_ERROR = Objective()
"""The objective of Ho et al. 2020, and what validation reports whatever is trained on."""
