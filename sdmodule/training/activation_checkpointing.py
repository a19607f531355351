"""Activations computed again in the backward pass instead of being kept (Chen et al. 2016)."""

from __future__ import annotations

from typing import Any

from sdmodule.errors import SettingsError, choices

CHECKPOINTING = ("none", "outer", "all")


def checkpoint_blocks(unet: Any, which: str) -> None:
    """Keep less of a UNet's activations for its backward pass.

    Args:
        unet: a ``UNet2DConditionModel``.
        which: ``none``; ``outer``, the blocks of full resolution, whose activations are the largest; or ``all``.

    Raises:
        SettingsError: for anything else.
    """
    if which not in CHECKPOINTING:
        raise SettingsError(f"model.checkpointing={which} is not known; give one of {choices(CHECKPOINTING)}.")
    if which == "none":
        return
    unet.enable_gradient_checkpointing()
    if which == "all":
        return
    outer = {unet.down_blocks[0], unet.up_blocks[-1]}
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None and block not in outer:
            block.gradient_checkpointing = False
