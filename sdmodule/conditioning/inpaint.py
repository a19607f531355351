"""What a UNet that inpaints sees beside the noisy latents, and how an ordinary UNet becomes one.

The nine channels are those of Stable Diffusion's inpainting checkpoints (Rombach et al. 2022, section 4.5 and the
published weights): noisy latents 4, mask 1, latents of the masked image 4. A mask is ``[B, 1, H, W]``, 1 where the
image is repainted and 0 where it stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
