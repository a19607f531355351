"""Decoding latents to images, again in float32 where half precision overflows."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.vae_precision import vae_in_float32, vae_precision
from sdmodule.errors import SettingsError


def decode(parts: Components, latents: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1], float32, from latents ``[B, 4, h, w]``.

    Activations of Stable Diffusion's VAE sometimes overflow half precision, which gives black images; such a batch is
    decoded again in float32; see `vae_precision` for a VAE that is known to overflow.

    Raises:
        SettingsError: if the latents, or the images even in float32, have NaNs or infs.
    """
    if not torch.isfinite(latents).all():
        raise SettingsError("the UNet produced NaNs or infs; use precision=32-true or bf16-mixed.")
    scaled = latents / parts.vae.config.scaling_factor
    with vae_precision(parts) as dtype:
        images = parts.vae.decode(scaled.to(dtype)).sample
    if not torch.isfinite(images).all():
        rank_zero_warn("The VAE overflows in half precision; such images are decoded again in float32.")
        with vae_in_float32(parts.vae):
            images = parts.vae.decode(scaled.float()).sample
    if not torch.isfinite(images).all():
        raise SettingsError(
            "the VAE produced NaNs or infs; use precision=32-true or bf16-mixed, or another checkpoint if these do "
            "not help."
        )
    return (images.float() / 2 + 0.5).clamp(0, 1)
