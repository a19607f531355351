"""Decoding latents to images, again in float32 where half precision overflows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError


def decode(parts: Components, latents: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1], float32, from latents ``[B, 4, h, w]``.

    Activations of Stable Diffusion's VAE sometimes overflow half precision, which gives black images; such a batch is
    decoded again in float32. That of a family with ``upcasts_vae`` is decoded in float32 at once if it asks for it.

    Raises:
        SettingsError: if the latents, or the images even in float32, have NaNs or infs.
    """
    if not torch.isfinite(latents).all():
        raise SettingsError("the UNet produced NaNs or infs; use precision=32-true or bf16-mixed.")
    scaled = latents / parts.vae.config.scaling_factor
    if parts.family.upcasts_vae and parts.vae.config.force_upcast and _computes_in(parts.vae) == torch.float16:
        with _in_float32(parts.vae):
            images = parts.vae.decode(scaled.float()).sample
    else:
        images = parts.vae.decode(scaled.to(parts.vae.dtype)).sample
    if not torch.isfinite(images).all():
        rank_zero_warn("The VAE overflows in half precision; such images are decoded again in float32.")
        with _in_float32(parts.vae):
            images = parts.vae.decode(scaled.float()).sample
    if not torch.isfinite(images).all():
        raise SettingsError(
            "the VAE produced NaNs or infs; use precision=32-true or bf16-mixed, or another checkpoint if these do "
            "not help."
        )
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _computes_in(vae: Any) -> torch.dtype:
    """What the VAE computes in: the dtype of its weights, or that of autocast."""
    device = vae.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else vae.dtype


@contextmanager
def _in_float32(vae: Any) -> Iterator[None]:
    """Compute in float32 inside the block, whatever the dtype of the weights and the trainer's precision are."""
    dtype = vae.dtype
    torch.nn.Module.to(vae, torch.float32)  # diffusers' own ``to`` warns, needlessly here
    try:
        with torch.autocast(vae.device.type, enabled=False):
            yield
    finally:
        torch.nn.Module.to(vae, dtype)
