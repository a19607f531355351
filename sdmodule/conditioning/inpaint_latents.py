"""What the denoising of masked images needs: where to start, what the UNet sees, what is put back at every step.

A UNet of nine channels is told of the mask and of what is around it. With an ordinary one the known region is put
back at each step, as noisy as that step's latents (Lugmayr et al. 2022, equation 8, without its resampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.inpaint_unet import is_inpaint_unet
from sdmodule.conditioning.inpaint import inpaint_channels, mask_out, masks_to_latents
from sdmodule.conditioning.inpaint_crop import InpaintCrop
from sdmodule.diffusion.sampler import draw_latents
from sdmodule.errors import SettingsError


@dataclass
class InpaintLatents:
    """A batch of B masked images, ready for the denoising loop.

    Attributes:
        masks: at the latents' size, ``[B, 1, h, w]``, 1 where it is repainted.
        noise: the standard normal noise that the images start from, ``[B, 4, h, w]``.
        known: latents of the images, ``[B, 4, h, w]``, where the start or the steps need them.
        channels: what a UNet that inpaints sees beside the latents, ``[B, 5, h, w]``; None for an ordinary one.
    """

    masks: Tensor
    noise: Tensor
    known: Tensor | None
    channels: Tensor | None

    def start(self, scheduler: Any, timesteps: Tensor, whole: bool) -> Tensor:
        """Latents to start from: noise alone for the ``whole`` schedule, else the image as noisy as it begins."""
        if whole or self.known is None:
            return self.noise * scheduler.init_noise_sigma
        return scheduler.add_noise(self.known, self.noise, timesteps[:1])

    def seen(self, latents: Tensor) -> Tensor:
        """What the UNet is given: the latents, and the mask's channels beside them if it takes them."""
        if self.channels is None:
            return latents
        channels = self.channels.repeat(len(latents) // len(self.channels), 1, 1, 1)  # guidance asks twice
        return torch.cat([latents, channels], dim=1)

    def keep(self, latents: Tensor, upcoming: Tensor | None, scheduler: Any) -> Tensor:
        """Put the known region back, as noisy as the ``upcoming`` timestep; the UNet of nine channels needs no help."""
        if self.channels is not None or self.known is None:
            return latents
        known = self.known
        if upcoming is not None:
            known = scheduler.add_noise(known, self.noise, upcoming.reshape(1))
        return (1 - self.masks) * known + self.masks * latents


def prepare_inpaint_latents(
    parts: Components,
    crops: Sequence[InpaintCrop],
    noise: Tensor | None,
    shape: tuple[int, int, int],
    sources: Sequence[torch.Generator],
    whole: bool,
) -> InpaintLatents:
    """Encode what a batch needs of its images.

    Args:
        parts: the model.
        crops: B images with their masks.
        noise: ``[B, 4, h, w]``; drawn if None.
        shape: ``(4, h, w)``.
        sources: one generator an image, from which its latents and its noise are drawn, in diffusers' order.
        whole: the schedule is walked from noise alone.

    Raises:
        SettingsError: for a mask that vanishes at the latents' size.
    """
    unet = parts.unet
    images = torch.stack([canvas.image for canvas in crops]).to(unet.device, unet.dtype)
    images = images.to(memory_format=torch.channels_last)  # as diffusers has them: the sums round alike
    masks = torch.stack([canvas.mask for canvas in crops]).to(images)
    told = is_inpaint_unet(unet)
    known = None if told and whole else encode_unsampled(parts, images, sources).contiguous()
    noise = draw_latents(shape, sources, like=images) if noise is None else noise.to(images)
    channels = inpaint_channels(masks, encode_unsampled(parts, mask_out(images, masks), sources)) if told else None
    small = masks_to_latents(masks, noise.shape[-2:])
    if not small.flatten(1).any(dim=1).all():
        height, width = images.shape[-2:]
        raise SettingsError(
            f"a mask is so small that nothing of it is left in the {width}x{height} pixels that the model works at; "
            "use only_masked=true, or paint it larger."
        )
    return InpaintLatents(small, noise, known, channels)


def encode_unsampled(parts: Components, images: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
    """Scaled latents ``[B, 4, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1], row k drawn with ``sources[k]``."""
    rows = [
        parts.vae.encode(image.to(parts.vae.dtype)).latent_dist.sample(source)
        for image, source in zip(images.split(1), sources, strict=True)
    ]
    return (torch.cat(rows) * parts.vae.config.scaling_factor).to(images)
