"""The training objective: what the denoiser predicts, and how its error counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdmodule.components.schedulers import make_scheduler
from sdmodule.diffusion.loss_weighting import WEIGHTINGS, loss_weights
from sdmodule.diffusion.noising import PREDICTION_TYPES, draw_timesteps, pseudo_huber
from sdmodule.errors import SettingsError, check_bool, check_choice, check_number
from sdmodule.training.rng import Generators


class Noise(NamedTuple):
    """Noise to predict and noise to add, both ``[B, C, h, w]``; the same unless the input is perturbed."""

    predicted: Tensor
    added: Tensor


@dataclass(frozen=True)
class Objective:
    """What the denoiser is trained to predict, and how its error counts.

    Args:
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``; the checkpoint's own if None.
        zero_terminal_snr: rescale the noise schedule so that the last timestep is pure noise, and sample with trailing
            timesteps (Lin et al. 2023, algorithm 1 and section 3.3).
        weighting: loss weight of each noise level: ``none``, ``min_snr``, ``soft_min_snr`` or ``debiased``.
        snr_gamma: signal-to-noise ratio at which ``min_snr`` and ``soft_min_snr`` cap the weight.
        noise_offset: standard deviation of a constant added to each channel's noise, which lets a model learn very
            dark and very bright images (Guttenberg 2023, "Diffusion with Offset Noise").
        input_perturbation: extra noise in the input that the target leaves out, relative to the noise (Ning et al.
            2023, algorithm 1).
        huber_delta: error from which the loss grows linearly (pseudo-Huber, Song and Dhariwal 2023, section 3.3);
            None is the squared error.
        masked: count the loss only where the mask of the data is white.
        caption_dropout: share of captions replaced by an empty one, which teaches the unconditional prediction that
            classifier-free guidance needs.
        timestep_shift: prefers noisy timesteps if greater than 1; see ``draw_timesteps``.
        prior_weight: for DreamBooth, weight of the class images relative to the instance images.

    Raises:
        SettingsError: for a value out of range, and for predicting noise where there is no signal.
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    weighting: str = "none"
    snr_gamma: float = 5.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    huber_delta: float | None = None
    masked: bool = False
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0
    prior_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type is not None:
            check_choice("objective.prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("objective.weighting", self.weighting, WEIGHTINGS)
        check_bool("objective.zero_terminal_snr", self.zero_terminal_snr)
        check_bool("objective.masked", self.masked)
        check_number("objective.snr_gamma", self.snr_gamma, above=0)
        if self.huber_delta is not None:
            check_number("objective.huber_delta", self.huber_delta, above=0)
        check_number("objective.noise_offset", self.noise_offset, minimum=0)
        check_number("objective.input_perturbation", self.input_perturbation, minimum=0)
        check_number("objective.caption_dropout", self.caption_dropout, minimum=0, maximum=1)
        check_number("objective.timestep_shift", self.timestep_shift, above=0)
        check_number("objective.prior_weight", self.prior_weight, minimum=0, below=1e6)

    def scheduler(self, own: Any) -> Any:
        """The noise scheduler to train and sample with: the checkpoint's ``own``, changed where the objective says so.

        Raises:
            SettingsError: if noise should be predicted where there is no signal.
        """
        changes: dict[str, Any] = {}
        if self.prediction_type is not None:
            changes["prediction_type"] = self.prediction_type
        if self.zero_terminal_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if not changes:
            return own
        config = {**own.config, **changes}
        if config.get("rescale_betas_zero_snr", False) and config.get("prediction_type", "epsilon") == "epsilon":
            raise SettingsError(
                "objective.zero_terminal_snr=true: with prediction_type=epsilon nothing of the image is learned at the "
                "last timestep, which is pure noise; set objective.prediction_type=v_prediction."
            )
        return make_scheduler({"name": "ddim", **changes}, own.config)

    def draw_timesteps(self, generators: Sequence[torch.Generator], total: int) -> Tensor:
        """A timestep from 0 to ``total - 1`` for each generator, ``[B]``."""
        return torch.cat([draw_timesteps(1, total, each, self.timestep_shift) for each in generators])

    def draw_noise(self, latents: Tensor, generator: Generators) -> Noise:
        """The noise of a batch of latents ``[B, C, h, w]``."""
        noise = randn_tensor(latents.shape, generator=generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * randn_tensor((*latents.shape[:2], 1, 1), generator=generator)
        if not self.input_perturbation:
            return Noise(noise.to(latents), noise.to(latents))
        extra = randn_tensor(latents.shape, generator=generator)
        return Noise(noise.to(latents), (noise + self.input_perturbation * extra).to(latents))

    def apply_mask(self, weights: Tensor, masks: Tensor | None) -> Tensor:
        """Loss weights ``[B, 1, h, w]``, zero outside the masks if ``masked``.

        Args:
            weights: ``[B, 1, h, w]``.
            masks: of the data, ``[B, 1, H, W]``, 1 where the loss counts.

        Raises:
            SettingsError: if ``masked`` and the data has no masks.
        """
        if not self.masked:
            return weights
        if masks is None:
            raise SettingsError(
                "objective.masked=true: the data has no masks; name them in a column mask_file_name of its metadata."
            )
        return weights * F.interpolate(masks.to(weights), size=weights.shape[-2:], mode="area")

    def errors(
        self, predicted: Tensor, wanted: Tensor, prediction_type: str, alphas_cumprod: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Weighted error of each latent pixel, averaged over channels: ``[B, 1, h, w]``."""
        difference = predicted.float() - wanted.float()
        errors = difference.square() if self.huber_delta is None else pseudo_huber(difference, self.huber_delta)
        weights = loss_weights(self.weighting, prediction_type, alphas_cumprod, timesteps, self.snr_gamma)
        return errors.mean(dim=1, keepdim=True) * weights.view(-1, 1, 1, 1)


SQUARED_ERROR = Objective()
"""The objective of Ho et al. 2020; validation always reports it, whatever the training objective is."""
