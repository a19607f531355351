"""Linear and GEGLU layers in bfloat16 on CPU, in C++: see ``linear.cpp``."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdmodule.speed.cpu.native.jit_build import load_library, pointer

SOURCE = Path(__file__).with_suffix(".cpp")

MULTIPLE = 32
"""Number that inputs and outputs are multiples of, and the least number of an image's tokens."""


class Panels(NamedTuple):
    """Weights in the order in which the kernel reads them."""

    weights: Tensor
    bias: Tensor


def supports(tokens: Tensor, layer: nn.Linear) -> bool:
    """Whether `native_linear` and `native_geglu` can compute a layer for such tokens ``[B, L, C]``."""
    return (
        tokens.dtype == layer.weight.dtype == torch.bfloat16
        and tokens.device.type == "cpu"
        and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
        and tokens.shape[-2] >= MULTIPLE  # of one image, so that an image is the same in any batch
    )


def native_linear(tokens: Tensor, layer: Any) -> Tensor:
    """A ``Linear`` of tokens ``[B, L, C]``, without gradients; ``layer.panels`` caches the packed weights."""
    if layer.panels is None:
        layer.panels = pack(layer, gated=False)
    return multiply(tokens, layer.panels, gated=False)


def native_geglu(tokens: Tensor, layer: Any) -> Tensor:
    """A ``GEGLU`` of tokens ``[B, L, C]``, without gradients; ``layer.panels`` caches the packed weights."""
    if layer.panels is None:
        layer.panels = pack(layer.proj, gated=True)
    return multiply(tokens, layer.panels, gated=True)


def pack(layer: nn.Linear, gated: bool) -> Panels:
    """The weights and the bias of a layer, packed; with a gate, each output beside its gate."""
    weight, bias = layer.weight.contiguous(), None if layer.bias is None else layer.bias.contiguous()
    panels = Panels(torch.empty_like(weight), torch.empty(layer.out_features, dtype=torch.float32))
    load_library(SOURCE).pack(
        pointer(weight),
        None if bias is None else pointer(bias),
        (ctypes.c_long * 3)(0, layer.in_features, layer.out_features),
        int(gated),
        pointer(panels.weights),
        pointer(panels.bias),
    )
    return panels


def multiply(tokens: Tensor, panels: Panels, gated: bool) -> Tensor:
    """Products of tokens ``[B, L, C]`` with packed weights."""
    outputs, inputs = panels.weights.shape
    tokens = tokens.contiguous()
    result = tokens.new_empty(*tokens.shape[:-1], outputs // 2 if gated else outputs)
    load_library(SOURCE).linear(
        pointer(tokens),
        pointer(panels.weights),
        pointer(panels.bias),
        pointer(result),
        (ctypes.c_long * 3)(tokens[..., 0].numel(), inputs, outputs),
        int(gated),
    )
    return result
