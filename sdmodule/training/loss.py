"""The denoising loss (Ho et al. 2020, algorithm 1) as functions of components, tensors and settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.control import ControlGuide
from sdmodule.conditioning.inpaint import inpaint_channels, mask_out
from sdmodule.diffusion.noising import add_noise, per_example_loss, prediction_target, prior_preservation_loss
from sdmodule.errors import SettingsError
from sdmodule.families.conditioning import Conditioning
from sdmodule.training.inpaint import InpaintTraining
from sdmodule.training.objective import SQUARED_ERROR, Noise, Objective
from sdmodule.training.step_inputs import MaskInputs, time_ids


@dataclass
class Conditions:
    """What the denoiser of a training batch is given beside the noisy latents.

    Attributes:
        text: the captions, and the sizes of the images for a denoiser that is told them.
        mask_channels: mask and masked-image latents for a UNet that inpaints, ``[B, 5, h, w]``.
        control: the ControlNet with its control images.
    """

    text: Conditioning
    mask_channels: Tensor | None = None
    control: ControlGuide | None = None


@torch.no_grad()
def encode_moments(parts: Components, image: Tensor) -> Tensor:
    """Mean and standard deviation of the latents of ``image`` ``[B, 3, H, W]`` in [-1, 1]: ``[B, 8, h, w]``.

    A VAE that overflows in float16 encodes in float32.
    """
    device = image.device.type
    halved = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=False) if halved and parts.upcasts_vae else nullcontext():
        posterior = parts.vae.encode(image.to(parts.vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def encode_images(parts: Components, batch: Mapping[str, Any], noise: Tensor) -> Tensor:
    """Scaled latents of a batch, ``[B, 4, h, w]``, sampled from its cached ``moments`` or from those of ``image``.

    Args:
        parts: whose VAE encodes images.
        batch: ``moments`` ``[B, 8, h, w]`` or ``image`` ``[B, 3, H, W]``.
        noise: normal numbers, ``[B, 4, h, w]``.
    """
    moments = batch["moments"].float() if "moments" in batch else encode_moments(parts, batch["image"])
    mean, deviation = moments.chunk(2, dim=1)
    return (mean + deviation * noise.to(mean)) * parts.vae.config.scaling_factor


def mask_channels(parts: Components, batch: Mapping[str, Any], drawn: MaskInputs | None) -> Tensor | None:
    """Mask and masked-image latents of a batch, ``[B, 5, h, w]``; None for text-to-image.

    Args:
        parts: whose VAE encodes the masked images.
        batch: ``image`` ``[B, 3, H, W]`` and, where none are drawn, ``mask`` ``[B, 1, H, W]``.
        drawn: masks and noise; None for text-to-image.
    """
    if drawn is None:
        return None
    images = batch["image"]
    masks = (batch["mask"] if drawn.masks is None else drawn.masks).to(images)
    latents = encode_images(parts, {"image": mask_out(images, masks)}, drawn.latent_noise)
    return inpaint_channels(masks, latents)


def control_guide(controlnet: Any, batch: Mapping[str, Any]) -> ControlGuide | None:
    """The ControlNet with a batch's control images, ``conditioning`` ``[B, 3, H, W]`` in [0, 1]; None without one.

    Raises:
        SettingsError: if the batch has no control images.
    """
    if controlnet is None:
        return None
    if "conditioning" not in batch:
        raise SettingsError("tuning=controlnet: the data has no control images; set data.conditioning=canny or files.")
    return ControlGuide(controlnet, batch["conditioning"])


def with_image_sizes(text: Conditioning, batch: Mapping[str, Any], parts: Components) -> Conditioning:
    """The captions of a batch with the sizes of its images, where the denoiser is told them."""
    return text.with_time_ids(time_ids(parts, batch))


def denoising_errors(
    parts: Components,
    latents: Tensor,
    noise: Noise,
    timesteps: Tensor,
    conditions: Conditions,
    objective: Objective = SQUARED_ERROR,
) -> Tensor:
    """Weighted error of the denoiser's prediction at each latent pixel, ``[B, 1, h, w]``.

    Args:
        parts: UNet and noise schedule.
        latents: clean, ``[B, 4, h, w]``.
        noise: the noise to predict and the noise to add.
        timesteps: ``[B]``.
        conditions: text, mask and control image.
        objective: how the error is weighted.
    """
    scheduler, told = parts.scheduler, parts.family.denoiser_arguments(conditions.text)
    prediction_type, alphas_cumprod = scheduler.config.prediction_type, parts.schedule_on(latents.device)
    noisy = add_noise(latents, noise.added, alphas_cumprod, timesteps)
    if conditions.mask_channels is not None:
        noisy = torch.cat([noisy, conditions.mask_channels], dim=1)
    residuals = {} if conditions.control is None else conditions.control.residuals(noisy, timesteps, told)
    predicted = parts.unet(noisy, timesteps, **told, **residuals).sample
    wanted = prediction_target(prediction_type, latents, noise.predicted, alphas_cumprod, timesteps)
    return objective.errors(predicted, wanted, prediction_type, alphas_cumprod, timesteps)


def spatial_loss_weights(
    errors: Tensor,
    batch: Mapping[str, Any],
    channels: Tensor | None,
    objective: Objective,
    inpaint: InpaintTraining | None = None,
) -> Tensor:
    """Weight of each latent pixel in the loss, ``[B, 1, h, w]``.

    Args:
        errors: ``[B, 1, h, w]``, for its shape and device.
        batch: its ``mask`` ``[B, 1, H, W]`` says where the loss counts if ``objective.masked``.
        channels: of `mask_channels`; None for text-to-image.
        objective: whether only the masked area counts.
        inpaint: weight of the area to inpaint; None for text-to-image.
    """
    weights = torch.ones_like(errors)
    if channels is not None and inpaint is not None:
        weights = weights + (inpaint.masked_area_weight - 1.0) * channels[:, :1]
    return objective.apply_mask(weights, batch.get("mask"))


def reduce_errors(
    errors: Tensor,
    batch: Mapping[str, Any],
    channels: Tensor | None,
    objective: Objective,
    inpaint: InpaintTraining | None = None,
) -> Tensor:
    """The loss, a scalar: the mean over examples, or DreamBooth's weighted sum over instance and class images.

    Args:
        errors: ``[B, 1, h, w]``.
        batch: its ``prior`` ``[B]`` says which examples are class images.
        channels: of `mask_channels`; None for text-to-image.
        objective: weight of the class images, and whether only the masked area counts.
        inpaint: weight of the area to inpaint; None for text-to-image.
    """
    losses = per_example_loss(errors, spatial_loss_weights(errors, batch, channels, objective, inpaint))
    if "prior" not in batch:
        return losses.mean()
    return prior_preservation_loss(losses, batch["prior"], objective.prior_weight)
