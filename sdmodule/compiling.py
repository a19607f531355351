"""Compilation of the UNet, block by block."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn


def compile_blocks(unet: nn.Module) -> None:
    """Compile a UNet block by block.

    Not the whole of it: on CPU in bfloat16, torch 2.13 computes wrong gradients for a compiled nearest-neighbour
    upsampling, and everything below it then learns nothing.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks_to_compile(unet):
        block.compile(dynamic=False)


def blocks_to_compile(unet: nn.Module) -> list[nn.Module]:
    """The blocks of which a UNet is made many times over."""
    return [block for block in unet.modules() if isinstance(block, (ResnetBlock2D, Transformer2DModel))]
