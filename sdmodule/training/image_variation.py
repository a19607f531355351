"""Small random changes of images that leave what they show: shift, scale, blur, colour, noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmodule.errors import SettingsError, check_number, choices


@dataclass(frozen=True)
class ImageVariation:
    """How far images are changed at most; 0 leaves them as they are.

    Attributes:
        shift: share of the side that an image is moved by, in either direction; its border fills what it leaves.
        scale: share by which it is enlarged or reduced.
        blur: weight of the image at half the resolution, in a mean with the image itself.
        colour: change of the contrast and of the brightness of each colour channel, as shares of the full range.
        noise: standard deviation of the noise, as a share of the full range.

    Raises:
        SettingsError: for a value that is not from 0 to 1.
    """

    shift: float = 0.0
    scale: float = 0.0
    blur: float = 0.0
    colour: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(f"model.variation.{field.name}", getattr(self, field.name), minimum=0, maximum=1)

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> ImageVariation:
        """What a mapping of these settings says; None changes nothing.

        Raises:
            SettingsError: for an unknown setting, too.
        """
        known = [field.name for field in fields(cls)]
        if unknown := set(settings or ()) - set(known):
            raise SettingsError(f"model.variation.{choices(unknown)}: unknown; it has {choices(known)}.")
        return cls(**(settings or {}))

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1], each changed in its own way; the generator is on the CPU."""
        count = len(images)

        def uniform(*shape: int) -> Tensor:
            return (2 * torch.rand(count, *shape, generator=generator) - 1).to(images)

        if self.shift or self.scale:
            images = _moved(images, 1 + self.scale * uniform(), 2 * self.shift * uniform(2))
        if self.blur:
            half = F.interpolate(images, scale_factor=0.5, mode="area")
            coarse = F.interpolate(half, size=images.shape[-2:], mode="bilinear", align_corners=False)
            images = torch.lerp(images, coarse, self.blur * uniform(1, 1, 1).clamp(min=0))
        if self.colour:
            images = images * (1 + self.colour * uniform(3, 1, 1)) + self.colour * uniform(3, 1, 1)
        if self.noise:
            noise = torch.randn(images.shape, generator=generator).to(images)
            images = images + 2 * self.noise * uniform(1, 1, 1).clamp(min=0) * noise
        return images.clamp(-1, 1)


def _moved(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Images resized by ``scale`` ``[B]`` and moved by ``shift`` ``[B, 2]``, of which 2 is a whole side."""
    places = torch.zeros(len(images), 2, 3).to(images)
    places[:, 0, 0] = places[:, 1, 1] = 1 / scale
    places[:, :, 2] = shift
    grid = F.affine_grid(places, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
