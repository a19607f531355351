"""The transformer blocks of a UNet: the position and the token grid of each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from diffusers.models.attention import BasicTransformerBlock

from sdmodule.errors import SettingsError

DOWNSAMPLES = (1, 2, 4, 8)

Grid = tuple[int, int]
"""Height and width in tokens."""


class PlacedBlock(NamedTuple):
    """A transformer block and its position.

    Attributes:
        block: the block.
        downsample: how much smaller than the latents its grid is.
        part: number of the UNet's down, middle or up block that contains it.
    """

    block: BasicTransformerBlock
    downsample: int
    part: int

    def grid(self, size: Grid) -> Grid:
        """Height and width in tokens for latents of a height and width; rounded up, as the UNet does."""
        return math.ceil(size[0] / self.downsample), math.ceil(size[1] / self.downsample)


def transformer_blocks(unet: Any) -> list[PlacedBlock]:
    """All transformer blocks of a UNet, in the order of its forward pass."""
    deepest = len(unet.down_blocks) - 1
    parts = [(part, level) for level, part in enumerate(unet.down_blocks)]
    parts += [(unet.mid_block, deepest)] if unet.mid_block is not None else []
    parts += [(part, deepest - level) for level, part in enumerate(unet.up_blocks)]
    return [
        PlacedBlock(module, 2**level, number)
        for number, (part, level) in enumerate(parts)
        for module in part.modules()
        if isinstance(module, BasicTransformerBlock)
    ]


def first_downsample(unet: Any) -> int:
    """Downsampling of a UNet's first transformer blocks.

    Raises:
        SettingsError: if there are none.
    """
    every = transformer_blocks(unet)
    if not every:
        raise SettingsError("tome: this UNet has no transformer blocks; set tome.ratio=0.")
    return min(placed.downsample for placed in every)


def blocks_to_merge(unet: Any, max_downsample: int | None) -> list[PlacedBlock]:
    """The transformer blocks that are downsampled by at most ``max_downsample``; if None, like the first ones.

    Raises:
        SettingsError: if there are none, or if one is not a block of Stable Diffusion.
    """
    first = first_downsample(unet)
    most = first if max_downsample is None else max_downsample
    chosen = [placed for placed in transformer_blocks(unet) if placed.downsample <= most]
    if not chosen:
        raise SettingsError(
            f"tome.max_downsample={max_downsample}: merges nothing in this UNet, whose transformer blocks start at a "
            f"downsampling of {first}; set tome.max_downsample={first}."
        )
    for block, _, _ in chosen:
        if block.norm_type != "layer_norm" or block.pos_embed is not None or hasattr(block, "fuser"):
            raise SettingsError(
                "tome: works with the transformer blocks of Stable Diffusion, and those of this UNet have other norms, "
                f"position embeddings or grounding boxes (norm_type={block.norm_type}); set tome.ratio=0."
            )
    return chosen
