"""What a training step draws and looks up on the host, before any network runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.captions import CaptionInputs, caption_inputs
from sdmodule.conditioning.random_masks import draw_masks
from sdmodule.training.batch import image_sizes
from sdmodule.training.inpaint import InpaintTraining
from sdmodule.training.objective import Noise, Objective
from sdmodule.training.rng import Generators
from sdmodule.training.upload import upload_together


class StepInputs(NamedTuple):
    """What a training step needs beside the batch of B images.

    Attributes:
        latent_noise: to sample latents from their distribution, ``[B, 4, h, w]``.
        timesteps: ``[B]``.
        masks: drawn ones; see `MaskInputs`.
        noise: to predict, and to add.
        text: the captions.
        time_ids: sizes of the images for a denoiser that is told them, ``[B, 6]``; else None.
    """

    latent_noise: Tensor
    timesteps: Tensor
    masks: MaskInputs | None
    noise: Noise
    text: CaptionInputs
    time_ids: Tensor | None


class MaskInputs(NamedTuple):
    """What is drawn to train a UNet that inpaints.

    Attributes:
        masks: ``[B, 1, H, W]``; None if the data has them.
        latent_noise: to sample the latents of the masked images, ``[B, 4, h, w]``.
    """

    masks: Tensor | None
    latent_noise: Tensor


def step_inputs(
    parts: Components,
    batch: Mapping[str, Any],
    generators: list[torch.Generator],
    objective: Objective,
    inpaint: InpaintTraining | None = None,
    cached: Any = None,
) -> StepInputs:
    """Draw what a training step needs, on the CPU, and bring it to the model's device in one copy.

    Args:
        parts: the model.
        batch: images with captions.
        generators: one per image.
        objective: how timesteps, noise and dropped captions are drawn.
        inpaint: how masks are drawn; None for text-to-image.
        cached: embeddings by prompt; see `encode_captions`.
    """
    latent_noise = draw_latent_noise(parts, batch, generators)
    timesteps = objective.draw_timesteps(generators, parts.num_timesteps)
    captions = drop_captions(batch["caption"], objective.caption_dropout, generators)
    masks = draw_mask_inputs(parts, batch, generators, inpaint)
    noise = objective.draw_noise(latent_noise, generators)
    text = caption_inputs(captions, parts, cached)
    drawn = StepInputs(latent_noise, timesteps, masks, noise, text, time_ids(parts, batch))
    return upload_together(drawn, parts.unet.device)


def draw_latent_noise(parts: Components, batch: Mapping[str, Any], generator: Generators) -> Tensor:
    """Normal numbers of the shape of the batch's latents, ``[B, 4, h, w]``, on the CPU."""
    if "moments" in batch:
        count, channels, height, width = batch["moments"].shape
        return randn_tensor((count, channels // 2, height, width), generator=generator)
    images, scale = batch["image"], parts.pixels_per_latent
    sides = (side // scale for side in images.shape[-2:])
    return randn_tensor((len(images), parts.vae.config.latent_channels, *sides), generator=generator)


def drop_captions(captions: Sequence[str], share: float, generators: Sequence[torch.Generator]) -> list[str]:
    """Captions, each replaced by an empty one with probability ``share`` (Ho and Salimans 2022, algorithm 1)."""
    return [
        "" if torch.rand((), generator=each) < share else caption
        for each, caption in zip(generators, captions, strict=True)
    ]


def draw_mask_inputs(
    parts: Components, batch: Mapping[str, Any], generator: Generators, inpaint: InpaintTraining | None
) -> MaskInputs | None:
    """What is drawn for the mask's channels of a batch, on the CPU; None for text-to-image.

    Args:
        parts: the model.
        batch: ``image`` ``[B, 3, H, W]`` and, optionally, ``mask`` ``[B, 1, H, W]``; otherwise masks are drawn.
        generator: source of masks and noise.
        inpaint: how many of the drawn masks cover the whole image; None for text-to-image.
    """
    if inpaint is None:
        return None
    images, masks = batch["image"], None
    if "mask" not in batch:
        masks = draw_masks(len(images), images.shape[-2:], inpaint.full_mask_share, generator)
    return MaskInputs(masks, draw_latent_noise(parts, {"image": images}, generator))


def time_ids(parts: Components, batch: Mapping[str, Any]) -> Tensor | None:
    """Sizes of the images of a batch, ``[B, 6]``, where the denoiser is told them; else None."""
    if not parts.family.takes_sizes:  # values on a GPU would have to be waited for
        return None
    return parts.family.time_ids(image_sizes(batch, parts.pixels_per_latent))
