"""How much of a batch the VAE decodes at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def vae_slicing(vae: Any, how: str) -> Iterator[None]:
    """Let an ``AutoencoderKL`` decode in parts inside a ``with`` block.

    Args:
        vae: the autoencoder.
        how: ``whole``; ``sliced``, image by image; or ``tiled``, which also splits large images into overlapping tiles
            and blends their seams.
    """
    before = vae.use_slicing, vae.use_tiling
    vae.use_slicing, vae.use_tiling = how != "whole", how == "tiled"
    try:
        yield
    finally:
        vae.use_slicing, vae.use_tiling = before
