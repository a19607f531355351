"""Inputs of an inpainting UNet beside the noisy latents: the mask and the latents of the masked image.

The order of the channels is in `sdmodule.components.inpaint_unet`. A mask is ``[B, 1, H, W]``, 1 where the image is
inpainted and 0 where it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
