"""Inputs of an inpainting UNet beside the noisy latents: the mask and the latents of the masked image.

The order of the channels is in `sdmodule.components.inpaint_unet`. A mask is ``[B, 1, H, W]``, 1 where the image is
inpainted and 0 where it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdmodule.errors import SettingsError, check_bool, check_number


@dataclass(frozen=True)
class InpaintTraining:
    """Settings for training a UNet to inpaint.

    Args:
        convert: convert an ordinary UNet to an inpainting UNet when training starts.
        whole_masks: share of training images whose mask covers all of them.
        hole_weight: weight of the loss inside the mask, relative to the loss outside it.

    Raises:
        SettingsError: for a value out of range.
    """

    convert: bool = False
    whole_masks: float = 0.25
    hole_weight: float = 1.0

    def __post_init__(self) -> None:
        check_bool("model.convert", self.convert)
        check_number("model.whole_masks", self.whole_masks, minimum=0, maximum=1)
        check_number("model.hole_weight", self.hole_weight, above=0)

    def check(self, unet: UNet2DConditionModel, source: str, trained: bool, tuning: str) -> None:
        """Check that an ordinary UNet may be converted, before training starts.

        Args:
            unet: an ordinary UNet.
            source: the checkpoint that it is from, for messages.
            trained: whether all of its weights are trained.
            tuning: name of the tuning method, for messages.

        Raises:
            SettingsError: if ``convert`` is off, or the new channels would not be trained.
        """
        if not self.convert:
            raise SettingsError(
                f"pretrained={source}: the UNet takes {unet.config.in_channels} channels and has none for the mask; "
                "set model.convert=true to add them, or give an inpainting checkpoint."
            )
        if not trained:
            raise SettingsError(
                f"model.convert=true: adds channels that tuning={tuning} does not train; use tuning=full."
            )

    def __str__(self) -> str:
        return ", ".join(f"model.{name}={value}" for name, value in asdict(self).items())


def mask_out(images: Tensor, masks: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in [-1, 1] with the masked area set to 0, mid-grey."""
    return images * (masks < 0.5)


def masks_to_latents(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks ``[B, 1, h, w]`` at the size ``(h, w)`` of the latents, by nearest neighbour."""
    return F.interpolate(masks, size=list(size))


def inpaint_channels(masks: Tensor, masked_latents: Tensor) -> Tensor:
    """Mask and masked latents, ``[B, 5, h, w]``, to concatenate to the noisy latents.

    Args:
        masks: ``[B, 1, H, W]``, at the images' size.
        masked_latents: scaled latents of the masked images, ``[B, 4, h, w]``.
    """
    height, width = masked_latents.shape[-2:]
    return torch.cat([masks_to_latents(masks, (height, width)).to(masked_latents), masked_latents], dim=1)
