"""What a UNet that inpaints sees beside the noisy latents, and how an ordinary UNet becomes one.

The nine channels are those of Stable Diffusion's inpainting checkpoints (Rombach et al. 2022, section 4.5 and the
published weights): noisy latents 4, mask 1, latents of the masked image 4. A mask is ``[B, 1, H, W]``, 1 where the
image is repainted and 0 where it stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.ranges import check_flag


@dataclass(frozen=True)
class InpaintTraining:
    """How a UNet is trained to inpaint.

    Args:
        convert: widen an ordinary UNet to the mask's channels when training starts.
        whole_masks: share of training images that are masked whole.
        hole_weight: how many times the loss in the hole counts that of the same area around it.

    Raises:
        SettingsError: for a value out of range.
    """

    convert: bool = False
    whole_masks: float = 0.25
    hole_weight: float = 1.0

    def __post_init__(self) -> None:
        check_flag("model.convert", self.convert)
        if not isinstance(self.whole_masks, (int, float)) or not 0 <= self.whole_masks <= 1:
            raise SettingsError(f"model.whole_masks={self.whole_masks} is not allowed; give a share from 0 to 1.")
        if not isinstance(self.hole_weight, (int, float)) or not 0 < self.hole_weight < math.inf:
            raise SettingsError(f"model.hole_weight={self.hole_weight} is not allowed; give a number over 0.")

    def check(self, unet: UNet2DConditionModel, source: str, trained: bool, tuning: str) -> None:
        """Check that an ordinary UNet may be widened, which training is about to do.

        Args:
            unet: an ordinary UNet.
            source: where it is from.
            trained: whether all of it is trained.
            tuning: what is trained, by name.

        Raises:
            SettingsError: if not.
        """
        if not self.convert:
            raise SettingsError(
                f"the UNet of pretrained={source} takes {unet.config.in_channels} channels and not the mask's, which "
                "training to inpaint needs; set model.convert=true to widen it, or give an inpainting checkpoint."
            )
        if not trained:
            raise SettingsError(
                f"model.convert=true adds channels that tuning={tuning} would not train; use tuning=full."
            )

    def __str__(self) -> str:
        return ", ".join(f"model.{name}={value}" for name, value in asdict(self).items())


def mask_out(images: Tensor, masks: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in [-1, 1] with the hole at mid-grey, which is 0."""
    return images * (masks < 0.5)


def masks_to_latents(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks at the size ``(h, w)`` of the latents, by nearest neighbour: ``[B, 1, h, w]``."""
    return F.interpolate(masks, size=list(size))


def inpaint_channels(masks: Tensor, masked_latents: Tensor) -> Tensor:
    """The five channels beside the noisy latents, ``[B, 5, h, w]``.

    Args:
        masks: ``[B, 1, H, W]`` in pixels.
        masked_latents: scaled latents of the masked images, ``[B, 4, h, w]``.
    """
    height, width = masked_latents.shape[-2:]
    return torch.cat([masks_to_latents(masks, (height, width)).to(masked_latents), masked_latents], dim=1)
