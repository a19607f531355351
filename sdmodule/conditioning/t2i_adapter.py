"""T2I-Adapters: a small network turns a control image into features once, for all steps (Mou et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import T2IAdapter
from torch import Tensor

FEATURES = "down_intrablock_additional_residuals"
"""Name of the UNet's argument for the features, which it adds within its blocks down."""


@dataclass
class T2IGuide:
    """Features of a batch of B control images.

    Attributes:
        features: of each block down, ``[B, C, h, w]``.
        scale: their weight, which they have been multiplied by.
    """

    features: list[Tensor]
    scale: float

    def residuals(
        self, latents: Tensor, timestep: Tensor, told: Mapping[str, Any], guess_mode: bool = False
    ) -> dict[str, Any]:
        """The features for the rows of ``latents`` ``[B or 2B, C, h, w]``; nothing else changes them."""
        times = len(latents) // len(self.features[0])
        return {FEATURES: [feature.repeat(times, 1, 1, 1) for feature in self.features]}


@torch.no_grad()
def t2i_guide(adapter: T2IAdapter, images: Tensor, scale: float) -> T2IGuide:
    """Compute the features of control images ``[B, 3, H, W]`` in [0, 1]; an adapter of one channel sees grey."""
    if adapter.config.in_channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype)  # ITU-R BT.601
        images = (images * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return T2IGuide([feature * scale for feature in adapter(images)], scale)
