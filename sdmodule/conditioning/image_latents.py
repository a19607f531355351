"""Latents of images that sampling starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.precision import latents_dtype
from sdmodule.components.vae_precision import vae_precision
from sdmodule.diffusion.sampler import Generators, draw_latents
from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError
from sdmodule.io.images import image_to_tensor


def encode_pixels(parts: Components, images: Tensor, generators: Generators) -> Tensor:
    """Scaled latents ``[B, 4, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1], sampled with one generator per image."""
    with vae_precision(parts) as dtype:
        if isinstance(generators, torch.Generator):
            latents = _draw(parts.vae.encode(images.to(dtype)).latent_dist, generators)
        else:
            rows = zip(images.split(1), generators, strict=True)
            latents = torch.cat([_draw(parts.vae.encode(one.to(dtype)).latent_dist, [source]) for one, source in rows])
    return (latents * parts.vae.config.scaling_factor).to(images)


def _draw(distribution: Any, generators: Generators) -> Tensor:
    """A sample of a VAE's distribution; its own ``sample`` waits for a GPU to be given the noise."""
    mean = distribution.mean
    return mean + distribution.std * draw_latents(mean.shape, generators, like=mean)


def image_latents(
    parts: Components, images: Sequence[Image.Image | Tensor], size: tuple[int, int], generators: Generators
) -> Tensor:
    """Scaled latents ``[B, 4, h, w]`` of images, resized to ``size`` ``(H, W)``; given latents are taken as they are.

    Raises:
        SettingsError: for latents of another size, or latents beside images.
    """
    unet = parts.unet
    given = [one for one in images if isinstance(one, Tensor)]
    if given and len(given) < len(images):
        raise SettingsError("image: some are images and others latents; give all as images, or all as latents.")
    if given:
        return upload(torch.stack(given), unet.device).to(latents_dtype(unet))
    height, width = size
    resized = [
        image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
        for image in images
        if isinstance(image, Image.Image)
    ]
    stacked = torch.stack([image_to_tensor(image) for image in resized])
    pixels = upload(stacked, unet.device).to(latents_dtype(unet))
    # channels_last as in diffusers, so that sums round alike
    return encode_pixels(parts, pixels.to(memory_format=torch.channels_last), generators)
