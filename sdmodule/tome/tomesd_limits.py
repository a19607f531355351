"""What tomesd 0.1.3 fails at, told before the first step."""

from __future__ import annotations

import math
from typing import Any

from sdmodule.errors import SettingsError
from sdmodule.tome.blocks import Grid, transformer_blocks


def check_tomesd(unet: Any, size: Grid, max_downsample: int) -> None:
    """Check that tomesd would see each block's grid as it is.

    It works the grid out from the number of tokens, and for sizes that a block's downsampling does not divide it can
    take one downsampling for another: it then merges another block than was asked for, or ends in an IndexError.

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
                f"tome.engine=tomesd with tome.max_downsample={max_downsample} fails for latents of {h} by {w}; "
                "use tome.engine=exact, or a height and width that the UNet's downsampling divides."
            )
