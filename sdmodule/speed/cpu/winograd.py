"""3x3 convolutions by Winograd's algorithm F(2, 3), with two thirds of the products.

Two rows of a result take six rows of products; F(2, 3) takes four, of sums and differences of the image's rows and the
kernel's (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1). It runs along the
height only: the error in bfloat16 is 1.9 times that of a direct convolution, measured with 320 to 2,560 channels. Along
the width as well it would take 4/9 of the products at 3.1 times the error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdmodule.speed.cpu.prepacked import prepack_convolution

Kernels = tuple[Tensor, Tensor, Tensor, Tensor]
"""Prepacked kernels of one row each: of the upper row, of the sum and the difference of the middle rows, and, negated,
of the lower row."""

PADDING = (0, 1)
UNIT: tuple[Any, ...] = ((1, 1), (1, 1), 1)
"""Stride, dilation and groups, all 1."""


def applies_to(layer: nn.Conv2d, image: Tensor) -> bool:
    """Whether a convolution of an image ``[B, C, h, w]`` is a plain 3x3 one that keeps the size, of even height."""
    settings = (layer.kernel_size, layer.padding, layer.stride, layer.dilation, layer.groups)
    return settings == ((3, 3), (1, 1), *UNIT) and image.shape[2] % 2 == 0


def transform_weights(layer: nn.Conv2d, image: Tensor) -> Kernels:
    """The four one-row kernels that replace a 3x3 kernel.

    Args:
        layer: a 3x3 convolution.
        image: ``[B, C, h, w]``; the weights are prepacked for its size.
    """
    upper, middle, lower = layer.weight.float().split(1, dim=2)
    rows = (upper, (upper + middle + lower) / 2, (upper - middle + lower) / 2, -lower)
    batch, channels, height, width = image.shape
    size = (batch, channels, height // 2, width)
    top, plus, minus, bottom = (prepack_convolution(row.to(layer.weight.dtype), size, PADDING, *UNIT) for row in rows)
    return top, plus, minus, bottom


def convolve(image: Tensor, kernels: Kernels, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of an image ``[B, C, h, w]`` of even height; the result is channels_last.

    With 640 and 1,280 channels it is 1.1 to 1.5 times as fast as torch in bfloat16
    (``benchmarks/results/layers_amx.json``), and in float32 1.25 to 1.5 times (``layers_float32.json``), on one thread
    of an Intel Xeon with AMX.
    """
    upper, lower = image[:, :, 0::2], image[:, :, 1::2]
    before, after = _new(lower), _new(upper)  # the rows that only one of two neighboring result rows sees
    torch.sub(lower[:, :, :-1], lower[:, :, 1:], out=before[:, :, 1:])
    torch.neg(lower[:, :, :1], out=before[:, :, :1])  # zero padding above the image
    torch.sub(upper[:, :, :-1], upper[:, :, 1:], out=after[:, :, :-1])
    after[:, :, -1:] = upper[:, :, -1:]

    plus = _row(upper + lower, kernels[1], None)
    minus = _row(lower - upper, kernels[2], None)
    total, difference = plus + minus, plus.sub_(minus)
    batch, channels, half, width = total.shape
    result = image.new_empty(batch, 2 * half, width, channels).permute(0, 3, 1, 2)
    result[:, :, 0::2] = _row(before, kernels[0], bias, total)
    result[:, :, 1::2] = _row(after, kernels[3], bias, difference)
    return result


def _new(rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.channels_last)


def _row(rows: Tensor, kernel: Tensor, bias: Tensor | None, other: Tensor | None = None) -> Tensor:
    """Convolve rows with a one-row kernel, and add ``other`` to the result before it is rounded."""
    convolution: Any = torch.ops.mkldnn._convolution_pointwise
    if other is None:
        return convolution(rows, kernel, bias, PADDING, *UNIT, "none", [], "")
    return convolution.binary(rows, other, kernel, bias, PADDING, *UNIT, "add", 1.0, None, [], None)
