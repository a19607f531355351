"""Inpainting UNets: 9 input channels, and how an ordinary UNet becomes one.

The channels are those of Stable Diffusion's inpainting checkpoints (Rombach et al. 2022, section 4.5, and the
published weights): noisy latents 4, mask 1, latents of the masked image 4.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdmodule.errors import SettingsError


def is_inpaint_unet(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet takes a mask and masked latents beside the noisy latents.

    Raises:
        SettingsError: for a UNet that takes neither 4 nor 9 channels.
    """
    latents = unet.config.out_channels
    if unet.config.in_channels not in (latents, 2 * latents + 1):
        raise SettingsError(
            f"unet.in_channels={unet.config.in_channels}: must be {latents} (text2image) or {2 * latents + 1} "
            "(inpaint); give another UNet."
        )
    return unet.config.in_channels != latents


@torch.no_grad()
def convert_to_inpaint(unet: UNet2DConditionModel) -> None:
    """Widen the first convolution of an ordinary UNet from 4 to 9 channels, in place.

    The new channels' weights are zero and the bias is kept: until it is trained, the converted UNet predicts the same
    for any mask, to the bit.
    """
    old = unet.conv_in
    latents = unet.config.in_channels
    weight = old.weight.new_zeros((old.out_channels, 2 * latents + 1, *old.kernel_size))
    weight[:, :latents] = old.weight
    new = nn.Conv2d(2 * latents + 1, old.out_channels, old.kernel_size, padding=old.padding)
    new.load_state_dict({"weight": weight, "bias": old.bias})
    unet.conv_in = new.to(old.weight).requires_grad_(old.weight.requires_grad)
    unet.register_to_config(in_channels=2 * latents + 1)
