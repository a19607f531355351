"""The interface of this package: context managers that run layers on CPU with the fastest kernel of this machine.

- `fastest_kernels` for a whole UNet,
- `fastest_convolutions` for the convolutions of any module, such as a VAE,
- `fastest_blocks` for some transformer blocks, such as those that merge tokens.

Inside the ``with`` block each layer runs the kernel, torch's own or one of this package, that was fastest when its
shape was first measured on this machine (see `sdmodule.speed.cpu.autotune`). Results differ from torch's by rounding.
The choice depends on a layer's shape and not on the number of images, so an image is the same in any batch.

Layers cache transformed copies of their weights: one and a half times the weights at most, or in float32 twice at 1,024
pixels and three times at 2,048. Weights must not change inside the block, except by training: a call with gradients
runs torch's kernel and drops the cached copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from sdmodule.speed.cpu.layers import (
    CONVOLUTION_CACHE,
    FASTEST_ATTENTION,
    GEGLU_CACHE,
    LINEAR_CACHE,
    FastestConv2d,
    FastestGEGLU,
    FastestLinear,
    can_prepack,
)
from sdmodule.speed.swap_class import swap_class


@contextmanager
def fastest_kernels(unet: Any) -> Iterator[None]:
    """Run a UNet's layers with the fastest kernels inside a ``with`` block.

    Args:
        unet: a ``UNet2DConditionModel`` on CPU that is not compiled.
    """
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    with fastest_convolutions(unet), fastest_blocks(blocks):
        yield


@contextmanager
def fastest_convolutions(module: nn.Module) -> Iterator[None]:
    """Run a module's convolutions with the fastest kernels inside a ``with`` block."""
    convolutions = [layer for layer in module.modules() if type(layer) is nn.Conv2d and can_prepack(layer)]
    with swap_class(FastestConv2d, convolutions, keeps=CONVOLUTION_CACHE):
        yield


@contextmanager
def fastest_blocks(blocks: Sequence[BasicTransformerBlock]) -> Iterator[None]:
    """Run attention, linear and GEGLU layers of transformer blocks with the fastest kernels inside a ``with`` block."""
    with _fastest_attention(blocks), fastest_linears(blocks):
        yield


@contextmanager
def fastest_linears(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run linear and GEGLU layers of modules with the fastest kernels inside a ``with`` block."""
    layers = [layer for module in modules for layer in module.modules()]
    linears, gated = ([layer for layer in layers if type(layer) is kind] for kind in (nn.Linear, GEGLU))
    with swap_class(FastestLinear, linears, keeps=LINEAR_CACHE), swap_class(FastestGEGLU, gated, keeps=GEGLU_CACHE):
        yield


@contextmanager
def _fastest_attention(blocks: Iterable[BasicTransformerBlock]) -> Iterator[None]:
    """Replace torch's attention in transformer blocks; a backend that was asked for by name stays."""
    layers = [layer for block in blocks for layer in (block.attn1, block.attn2) if layer is not None]
    plain = [layer for layer in layers if type(layer.processor) is AttnProcessor2_0]
    before = [layer.processor for layer in plain]
    try:
        for layer in plain:
            layer.set_processor(FASTEST_ATTENTION)
        yield
    finally:
        for layer, own in zip(plain, before, strict=True):
            if layer.processor is FASTEST_ATTENTION:  # not a processor that was set inside the block
                layer.set_processor(own)
