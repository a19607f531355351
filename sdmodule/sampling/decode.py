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
    decoded again in float32, and those after it in float32 at once, as by a VAE that is known to overflow
    (see `vae_precision`).

    Raises:
        SettingsError: if the latents, or the images even in float32, have NaNs or infs.
    """
    if not torch.isfinite(latents).all():
        raise SettingsError("the UNet produced NaNs or infs; use precision=32-true or bf16-mixed.")
    images = _decode(parts, latents)
    if not torch.isfinite(images).all() and not parts.vae_overflows:
        rank_zero_warn("The VAE overflows in half precision; such images are decoded again in float32.")
        parts.vae_overflows = True
        with vae_in_float32(parts.vae):
            images = parts.vae.decode((latents / parts.vae.config.scaling_factor).float()).sample
    if not torch.isfinite(images).all():
        raise SettingsError(
            "the VAE produced NaNs or infs; use precision=32-true or bf16-mixed, or another checkpoint if these do "
            "not help."
        )
    return _in_unit_range(images)


class Decoding:
    """Images on their way from a GPU, which are decoded while the host goes on.

    They are decoded on the stream of the denoising: the kernels of a VAE fill a GPU, and beside the next batch's
    denoising its memory would be needed on top.

    Args:
        parts: the model.
        latents: on a GPU, ``[B, 4, h, w]``.
        as_bytes: round the images to 8 bits there; otherwise they are float32 in [0, 1].
    """

    def __init__(self, parts: Components, latents: Tensor, as_bytes: bool) -> None:
        self.parts, self.latents, self.as_bytes = parts, latents, as_bytes
        images = _decode(parts, latents)
        self._finite = _to_host(torch.isfinite(images).all() & torch.isfinite(latents).all())
        self._images = _to_host(_shown(_in_unit_range(images), as_bytes))
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(latents.device))

    @torch.no_grad()
    def result(self) -> Tensor:
        """The images ``[B, 3, H, W]``, once they are there, decoded again in float32 where half precision overflowed.

        Raises:
            SettingsError: as `decode` does.
        """
        self._done.synchronize()
        if self._finite:
            return self._images
        return _shown(decode(self.parts, self.latents), self.as_bytes).cpu()


def _decode(parts: Components, latents: Tensor) -> Tensor:
    scaled = latents / parts.vae.config.scaling_factor
    with vae_precision(parts) as dtype:
        return parts.vae.decode(scaled.to(dtype)).sample


def _in_unit_range(images: Tensor) -> Tensor:
    return (images.float() / 2 + 0.5).clamp(0, 1)


def _shown(images: Tensor, as_bytes: bool) -> Tensor:
    return (images * 255).round().to(torch.uint8) if as_bytes else images


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which is not waited for."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
