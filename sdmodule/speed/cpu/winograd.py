"""Convolutions of 3x3 with two thirds of the products.

Two rows of a result take six rows of products: three for each. Winograd's algorithm F(2, 3) takes four, of sums and
differences of the rows given and of the kernel's (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural
Networks", section 4.1). Here it runs along the height alone, and the error in bfloat16 is 1.9 times that of an ordinary
convolution, measured with 320 to 2,560 channels. Along the width too there would be 4/9 of the products, and 3.1 times
the error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdmodule.speed.cpu.prepacked import pack_convolution

Kernels = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one row each, in the order in which they are multiplied: for the upper row of the result, for the sum and for the
difference of the two rows in its midst, and, negative, for the lower row."""

PADDING = (0, 1)
AS_USUAL: tuple[Any, ...] = ((1, 1), (1, 1), 1)
"""Stride, dilation and groups."""


def is_ordinary(layer: nn.Conv2d, image: Tensor) -> bool:
    """Whether a convolution of an image ``[B, C, h, w]`` is one of 3x3 to the same, even height."""
    settings = (layer.kernel_size, layer.padding, layer.stride, layer.dilation, layer.groups)
    return settings == ((3, 3), (1, 1), *AS_USUAL) and image.shape[2] % 2 == 0


def kernels_of(layer: nn.Conv2d, image: Tensor) -> Kernels:
    """The four kernels of one row that stand for a convolution's one of three.

    Args:
        layer: of 3x3.
        image: ``[B, C, h, w]``; the order of weights depends on its size.
    """
    upper, middle, lower = layer.weight.float().split(1, dim=2)
    rows = (upper, (upper + middle + lower) / 2, (upper - middle + lower) / 2, -lower)
    batch, channels, height, width = image.shape
    size = (batch, channels, height // 2, width)
    first, both, apart, last = (pack_convolution(row.to(layer.weight.dtype), size, PADDING, *AS_USUAL) for row in rows)
    return first, both, apart, last


def convolve(image: Tensor, kernels: Kernels, bias: Tensor | None) -> Tensor:
    """What a convolution of 3x3 gives for an image ``[B, C, h, w]`` of even height; channels come innermost."""
    upper, lower = image[:, :, 0::2], image[:, :, 1::2]
    before, after = _new(lower), _new(upper)  # of rows of the image, those that both rows of a result do not share
    torch.sub(lower[:, :, :-1], lower[:, :, 1:], out=before[:, :, 1:])
    torch.neg(lower[:, :, :1], out=before[:, :, :1])  # above the image are zeros
    torch.sub(upper[:, :, :-1], upper[:, :, 1:], out=after[:, :, :-1])
    after[:, :, -1:] = upper[:, :, -1:]

    both = _row(upper + lower, kernels[1], None)
    apart = _row(lower - upper, kernels[2], None)
    total, difference = both + apart, both.sub_(apart)
    batch, channels, half, width = total.shape
    result = image.new_empty(batch, 2 * half, width, channels).permute(0, 3, 1, 2)
    result[:, :, 0::2] = _row(before, kernels[0], bias, total)
    result[:, :, 1::2] = _row(after, kernels[3], bias, difference)
    return result


def _new(rows: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.channels_last)


def _row(rows: Tensor, kernel: Tensor, bias: Tensor | None, other: Tensor | None = None) -> Tensor:
    """Convolve rows with a kernel of one row, and add something to the result before it is rounded."""
    convolution: Any = torch.ops.mkldnn._convolution_pointwise
    if other is None:
        return convolution(rows, kernel, bias, PADDING, *AS_USUAL, "none", [], "")
    return convolution.binary(rows, other, kernel, bias, PADDING, *AS_USUAL, "add", 1.0, None, [], None)
