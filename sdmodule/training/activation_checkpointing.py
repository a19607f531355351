"""Activation checkpointing: the backward pass recomputes activations instead of storing them (Chen et al. 2016)."""

from __future__ import annotations

from typing import Any

CHECKPOINTING = ("none", "outer", "all")


def checkpoint_blocks(unet: Any, which: str) -> None:
    """Turn on activation checkpointing in some blocks of a UNet, which saves memory and costs time.

    Args:
        unet: a ``UNet2DConditionModel``.
        which: one of `CHECKPOINTING`; ``outer`` is the blocks of full resolution, whose activations are the largest.
    """
    if which == "none":
        return
    unet.enable_gradient_checkpointing()
    if which == "all":
        return
    outer = {unet.down_blocks[0], unet.up_blocks[-1]}
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None and block not in outer:
            block.gradient_checkpointing = False
