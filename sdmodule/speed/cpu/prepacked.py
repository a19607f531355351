"""Weights kept in the order in which they are multiplied.

oneDNN, by which torch convolves on CPU, and multiplies in bfloat16, works on weights in an order of its own, and torch
has them put into it anew at every call. For layers of many channels and few pixels that takes as long as the products.
What ``torch.compile`` calls freezing keeps such weights in compiled models; here layers keep them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, keeps weights of a type in that order."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_convolution(
    weight: Tensor, size: tuple[int, ...], padding: Pair, stride: Pair, dilation: Pair, groups: int
) -> Tensor:
    """A kernel ``[D, C, h, w]`` in order for images of a size ``[B, C, H, W]``; it serves other sizes as well."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    return reorder(weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, size)


def packed_convolution(image: Tensor, layer: Any) -> Tensor:
    """What a ``Conv2d`` gives for an image ``[B, C, h, w]``, without gradients; ``layer.packed`` keeps its weights.

    The result has its channels innermost. In bfloat16 it was equal to the bit wherever that was tried.
    """
    settings: Any = (layer.padding, layer.stride, layer.dilation, layer.groups)
    if layer.packed is None:
        layer.packed = pack_convolution(layer.weight, tuple(image.shape), *settings)
    return torch.ops.mkldnn._convolution_pointwise(image, layer.packed, layer.bias, *settings, "none", [], "")


def packed_linear(tokens: Tensor, layer: Any) -> Tensor:
    """What a ``Linear`` gives for tokens ``[B, L, C]``, without gradients; ``layer.packed`` keeps its weights.

    Besides, torch would write the bias into the whole result before it adds the product.
    """
    if layer.packed is None:
        layer.packed = pack_linear(layer.weight, tokens)
    return torch.ops.mkldnn._linear_pointwise(tokens, layer.packed, layer.bias, "none", [], "")


def fused_geglu(tokens: Tensor, layer: Any) -> Tensor:
    """What a ``GEGLU`` gives for tokens ``[B, L, C]``, without gradients; ``layer.halves`` keeps its weights.

    Its gates pass the activation while they are multiplied, and multiply the other half while that is; only gates are
    rounded in between.
    """
    if layer.halves is None:
        biases = (None, None) if layer.proj.bias is None else layer.proj.bias.chunk(2)
        layer.halves = [(pack_linear(half, tokens), bias) for half, bias in zip(layer.proj.weight.chunk(2), biases)]
    (half, bias), (gate, bias_of_gate) = layer.halves
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    gates = multiply(tokens, gate, bias_of_gate, "gelu", [], "none")
    return multiply.binary(tokens, gates, half, bias, "mul")


def pack_linear(weight: Tensor, tokens: Tensor) -> Tensor:
    """A matrix ``[D, C]`` in order for tokens ``[B, L, C]``; it serves other numbers of them as well."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), tokens[..., 0].numel())
