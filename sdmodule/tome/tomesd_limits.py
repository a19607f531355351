"""Latent sizes that tomesd 0.1.3 cannot handle, checked before the first step."""

from __future__ import annotations

import math
from typing import Any

from sdmodule.errors import SettingsError
from sdmodule.tome.blocks import Grid, transformer_blocks


def check_tomesd(unet: Any, size: Grid, max_downsample: int) -> None:
    """Check that tomesd infers the right token grid for each block.

    It infers the grid from the number of tokens. For sizes that a block's downsampling does not divide, it can confuse
    one downsampling with another, and then merges the wrong blocks or raises an IndexError.

    Args:
        unet: a ``UNet2DConditionModel``.
        size: height and width of the latents.
        max_downsample: as in `sdmodule.tome.token_merging.TokenMerging`.

    Raises:
        SettingsError: for such a size.
    """
    h, w = size
    for placed in transformer_blocks(unet):
        grid = placed.grid(size)
        guess = math.ceil(math.sqrt(h * w // (grid[0] * grid[1])))
        merges, should = guess <= max_downsample, placed.downsample <= max_downsample
        if merges != should or (merges and (math.ceil(h / guess), math.ceil(w / guess)) != grid):
            raise SettingsError(
                f"tome.engine=tomesd: fails for latents of {h} by {w} with tome.max_downsample={max_downsample}; "
                "use tome.engine=exact, or a height and width that the UNet's downsampling divides."
            )
