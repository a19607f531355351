"""Weights prepacked in oneDNN's own order.

Torch convolves on CPU, and multiplies in bfloat16, with oneDNN, which reorders the weights at every call. For layers of
many channels and few pixels that takes as long as the products. ``torch.compile`` caches reordered weights when it
freezes a model; here each layer caches its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


def supports_prepacking(dtype: torch.dtype) -> bool:
    """Whether this build of torch can prepack weights of a dtype on this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack_convolution(
    weight: Tensor, size: tuple[int, ...], padding: Pair, stride: Pair, dilation: Pair, groups: int
) -> Tensor:
    """A convolution kernel ``[D, C, h, w]`` prepacked for images ``[B, C, H, W]``; other sizes work too."""
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    return reorder(weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, size)


def prepacked_convolution(image: Tensor, layer: Any) -> Tensor:
    """A ``Conv2d`` of an image ``[B, C, h, w]``, without gradients; ``layer.packed`` caches the prepacked weights.

    It is 1.1 to 1.5 times as fast as torch in bfloat16, on one thread of an Intel Xeon with AMX
    (``benchmarks/results/layers_amx.json``). The result is channels_last. In bfloat16 it was equal to torch's to the
    bit wherever that was tried.
    """
    settings: Any = (layer.padding, layer.stride, layer.dilation, layer.groups)
    if layer.packed is None:
        layer.packed = prepack_convolution(layer.weight, tuple(image.shape), *settings)
    return torch.ops.mkldnn._convolution_pointwise(image, layer.packed, layer.bias, *settings, "none", [], "")


def prepacked_linear(tokens: Tensor, layer: Any) -> Tensor:
    """A ``Linear`` of tokens ``[B, L, C]``, without gradients; ``layer.packed`` caches the prepacked weights.

    It is 1.1 to 3.2 times as fast as torch in bfloat16, on one thread of an Intel Xeon with AMX
    (``benchmarks/results/layers_amx.json``). It also adds the bias as it multiplies, where torch fills the result with
    the bias first.
    """
    if layer.packed is None:
        layer.packed = prepack_linear(layer.weight, tokens)
    return torch.ops.mkldnn._linear_pointwise(tokens, layer.packed, layer.bias, "none", [], "")


def fused_geglu(tokens: Tensor, layer: Any) -> Tensor:
    """A ``GEGLU`` of tokens ``[B, L, C]``, without gradients; ``layer.halves`` caches the prepacked weights.

    The activation is fused with the gates' product, and the gates with that of the other half. Of the intermediate
    results only the gates are rounded. It is 1.3 to 2.0 times as fast as diffusers in bfloat16, on one thread of an
    Intel Xeon with AMX (``benchmarks/results/layers_amx.json``).
    """
    if layer.halves is None:
        biases = (None, None) if layer.proj.bias is None else layer.proj.bias.chunk(2)
        layer.halves = [(prepack_linear(half, tokens), bias) for half, bias in zip(layer.proj.weight.chunk(2), biases)]
    (half, bias), (gate, gate_bias) = layer.halves
    multiply: Any = torch.ops.mkldnn._linear_pointwise
    gates = multiply(tokens, gate, gate_bias, "gelu", [], "none")
    return multiply.binary(tokens, gates, half, bias, "mul")


def prepack_linear(weight: Tensor, tokens: Tensor) -> Tensor:
    """A matrix ``[D, C]`` prepacked for tokens ``[B, L, C]``; other numbers of tokens work too."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), tokens[..., 0].numel())
