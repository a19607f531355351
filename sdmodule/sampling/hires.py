"""A second, larger pass: the sample is enlarged, partly noised again and denoised at the larger size.

This is the "hires fix" of AUTOMATIC1111's web UI: an image larger than those the model was trained on has its layout
from the native size and its detail from the second pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.image_latents import encode_pixels
from sdmodule.diffusion.sampler import Generators
from sdmodule.errors import check_choice, check_number
from sdmodule.sampling.decode import decode

UPSCALE = ("image", "latents")


@dataclass(frozen=True)
class Hires:
    """How a sample is enlarged.

    Args:
        scale: factor of height and width; 1 makes no second pass.
        strength: share of the schedule that the second pass denoises.
        upscale: what is enlarged: the ``image``, which stays sharp, or its ``latents``, which needs no VAE but a
            strength above about 0.5.

    Raises:
        SettingsError: for a value out of range.
    """

    scale: float = 1.0
    strength: float = 0.5
    upscale: str = "image"

    def __post_init__(self) -> None:
        check_number("hires", self.scale, minimum=1, maximum=8)
        check_number("hires_strength", self.strength, above=0, maximum=1)
        check_choice("hires_upscale", self.upscale, UPSCALE)

    def enlarged(self, size: tuple[int, int], factor: int) -> tuple[int, int]:
        """Height and width of the second pass, multiples of ``factor``."""
        height, width = (max(round(side * self.scale / factor), 1) * factor for side in size)
        return height, width


def enlarge(parts: Components, latents: Tensor, size: tuple[int, int], upscale: str, generators: Generators) -> Tensor:
    """Latents ``[B, 4, H / f, W / f]`` of a sample enlarged to ``size`` ``(H, W)``, from latents ``[B, 4, h, w]``."""
    factor = parts.pixels_per_latent
    if upscale == "latents":
        target = [side // factor for side in size]
        return F.interpolate(latents.float(), size=target, mode="bicubic", antialias=False).to(latents)
    images = decode(parts, latents)
    larger = F.interpolate(images, size=list(size), mode="bicubic", antialias=False).clamp(0, 1)
    pixels = (2 * larger - 1).to(latents.device, latents.dtype).contiguous(memory_format=torch.channels_last)
    return encode_pixels(parts, pixels, generators)
