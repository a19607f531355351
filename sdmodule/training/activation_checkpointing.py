"""Activation checkpointing: the backward pass recomputes activations instead of storing them (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CHECKPOINTING = ("none", "outer", "all")


def checkpoint_blocks(networks: Iterable[Any], which: str) -> None:
    """Turn on activation checkpointing in some blocks of networks, which saves memory and costs time.

    Args:
        networks: a ``UNet2DConditionModel`` and, if there is one, a ``ControlNetModel``.
        which: one of `CHECKPOINTING`; ``outer`` is the blocks of full resolution, whose activations are the largest.
    """
    for network in networks if which != "none" else ():
        if network is None:
            continue
        network.enable_gradient_checkpointing()
        down, up = list(network.down_blocks), list(getattr(network, "up_blocks", ()))
        inner = (*down[1:], network.mid_block, *up[:-1]) if which == "outer" else ()
        for block in filter(None, inner):
            for module in block.modules():  # the transformers in a block have a switch of their own
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
