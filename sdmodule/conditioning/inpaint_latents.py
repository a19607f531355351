"""Latents for denoising masked images: the start, the input of the UNet, and the known region.

An inpainting UNet gets the mask and the masked image as input. With an ordinary UNet, the known region replaces the
latents outside the mask after each step, at the next step's noise level (Lugmayr et al. 2022, equation 8, without its
resampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.inpaint_unet import is_inpaint_unet
from sdmodule.components.precision import latents_dtype
from sdmodule.conditioning.image_latents import encode_pixels
from sdmodule.conditioning.inpaint import inpaint_channels, mask_out, masks_to_latents
from sdmodule.conditioning.inpaint_crop import InpaintCrop
from sdmodule.diffusion.noise_level import NoiseLevel
from sdmodule.diffusion.sampler import Generators, draw_latents
from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError


@dataclass
class InpaintLatents:
    """Latents of a batch of B masked images.

    Attributes:
        masks: at the latents' size, ``[B, 1, h, w]``, 1 where the image is inpainted.
        noise: standard normal noise that sampling starts from, ``[B, 4, h, w]``.
        known: latents of the images, ``[B, 4, h, w]``; None if neither the start nor the steps need them.
        channels: further input of an inpainting UNet, ``[B, 5, h, w]``; None for an ordinary one.
    """

    masks: Tensor
    noise: Tensor
    known: Tensor | None
    channels: Tensor | None

    def start(self, scheduler: Any, level: NoiseLevel, whole: bool) -> Tensor:
        """Initial latents ``[B, 4, h, w]``: pure noise for the ``whole`` schedule, else the image at a noise level."""
        if whole or self.known is None:
            return self.noise * scheduler.init_noise_sigma
        return level.noised(self.known, self.noise)

    def denoiser_input(self, latents: Tensor) -> Tensor:
        """Input of the UNet: the latents, with the mask and masked latents for an inpainting UNet."""
        if self.channels is None:
            return latents
        channels = self.channels.repeat(len(latents) // len(self.channels), 1, 1, 1)  # twice with guidance
        return torch.cat([latents, channels], dim=1)

    @property
    def restores(self) -> bool:
        """Whether the known region is restored after each step; inpainting UNets do not need it."""
        return self.channels is None and self.known is not None

    def restore_known_region(self, latents: Tensor, level: NoiseLevel | None) -> Tensor:
        """Restore the known region at the noise level of the next step; without noise after the last."""
        assert self.known is not None
        known = self.known if level is None else level.noised(self.known, self.noise)
        return (1 - self.masks) * known + self.masks * latents


def prepare_inpaint_latents(
    parts: Components,
    crops: Sequence[InpaintCrop],
    noise: Tensor | None,
    shape: tuple[int, int, int],
    generators: Generators,
    whole: bool,
) -> InpaintLatents:
    """Encode a batch of masked images.

    Args:
        parts: the model.
        crops: B images with their masks.
        noise: ``[B, 4, h, w]``; drawn if None.
        shape: ``(4, h, w)``.
        generators: one per image, or one for all; latents and noise are drawn from it in diffusers' order.
        whole: sampling starts from pure noise.

    Raises:
        SettingsError: for a mask that is empty at the latents' size.
    """
    unet = parts.unet
    masks = torch.stack([crop.mask for crop in crops])
    _check_masks(masks, shape[1:])
    images = upload(torch.stack([crop.image for crop in crops]), unet.device).to(latents_dtype(unet))
    images = images.to(memory_format=torch.channels_last)  # as in diffusers, so that sums round alike
    masks = upload(masks, unet.device).to(images)
    is_inpaint = is_inpaint_unet(unet)
    # the order of these draws is that of diffusers' pipeline
    known = None if is_inpaint and whole else encode_pixels(parts, images, generators).contiguous()
    whole_shape = (len(crops), *shape)
    noise = draw_latents(whole_shape, generators, like=images) if noise is None else noise.to(images)
    channels = None
    if not is_inpaint:  # diffusers encodes the masked image for this UNet too, and only then drops it
        draw_latents(whole_shape, generators, like=images)
    else:
        channels = inpaint_channels(masks, encode_pixels(parts, mask_out(images, masks), generators))
    latent_masks = masks_to_latents(masks, noise.shape[-2:])
    return InpaintLatents(latent_masks, noise, known, channels)


def _check_masks(masks: Tensor, size: Sequence[int]) -> None:
    if masks_to_latents(masks, size).flatten(1).any(dim=1).all():
        return
    height, width = masks.shape[-2:]
    raise SettingsError(
        f"mask: too small, since nothing of it is left at the model's size of {width}x{height} pixels; "
        "use only_masked=true, or paint a larger mask."
    )
