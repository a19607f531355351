"""In which precision a VAE computes: in float32 where that of Stable Diffusion XL would overflow half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sdmodule.components.checkpoint import Components
from sdmodule.components.precision import computes_in


@contextmanager
def vae_precision(parts: Components) -> Iterator[torch.dtype]:
    """The dtype of the VAE's input and weights inside the block.

    The VAE of a family with ``upcasts_vae`` computes in float32 instead of float16 if its configuration asks for it,
    and so does one that overflowed before.
    """
    if (parts.upcasts_vae or parts.vae_overflows) and computes_in(parts.vae) == torch.float16:
        with vae_in_float32(parts.vae):
            yield torch.float32
    else:
        yield parts.vae.dtype


@contextmanager
def vae_in_float32(vae: Any) -> Iterator[None]:
    """Compute in float32 inside the block, whatever the dtype of the weights and the trainer's precision are."""
    before = [(weight, weight.data) for weight in (*vae.parameters(), *vae.buffers())]
    try:
        for weight, data in before:
            weight.data = data.float() if data.is_floating_point() else data
        with torch.autocast(vae.device.type, enabled=False):
            yield
    finally:
        for weight, data in before:  # not all of them need be in 16 bits
            weight.data = data
