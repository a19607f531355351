"""3x3 convolutions in float32 by Winograd's algorithm F(4x4, 3x3), with a quarter of the products.

A 4x4 tile of a result takes 144 products for each pair of channels; F(4x4, 3x3) takes 36, of sums over the 6x6 tile of
the image and over the kernel (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", sections 4.2
and 4.3). In float32 the relative error is 3e-6 to 4e-6, where direct convolutions have 2e-7 to 2e-6 depending on the
processor, measured with 320 to 1,920 channels. In bfloat16 it would be far too large; `winograd` is for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdmodule.speed.cpu.winograd import applies_to as is_plain_3x3

SIDE, LINES = 4, 6
"""Side of a tile of the result, and of the image's tile that it comes from."""

MIN_PIXELS = 1024
"""Fewest pixels of an image: transformed weights are four times as large, and layers of small images have the most."""

MAX_TILES = 512
"""Most tiles that are multiplied at once."""

KERNEL_SUMS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
"""The matrix G of the algorithm, which transforms the kernel; `_transform_image` and `_transform_result` apply its
matrices for image and result, B and A."""


def applies_to(layer: nn.Conv2d, image: Tensor) -> bool:
    """Whether a convolution of an image ``[B, C, h, w]`` is a plain 3x3 one in float32, of large enough whole tiles.

    False where ``torch.set_float32_matmul_precision`` allows torch to round float32 products: it does not round those
    of direct convolutions, and rounding would ruin these.
    """
    height, width = image.shape[2:]
    large = height * width >= MIN_PIXELS and height % SIDE == width % SIDE == 0
    return large and image.dtype == torch.float32 and is_plain_3x3(layer, image) and float32_is_exact()


def float32_is_exact() -> bool:
    """Whether torch computes float32 products on CPU in float32."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):  # older versions of torch
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def transform_weights(layer: nn.Conv2d) -> Tensor:
    """The matrices ``[36, C, D]`` that replace a kernel ``[D, C, 3, 3]``."""
    sums = torch.tensor(KERNEL_SUMS, dtype=layer.weight.dtype, device=layer.weight.device)
    kernel = layer.weight.permute(3, 2, 1, 0)  # width first, as in the tiles
    return (torch.kron(sums, sums) @ kernel.flatten(2).flatten(0, 1)).view(LINES**2, *kernel.shape[2:])


def convolve(image: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of an image ``[B, C, h, w]``; the result is channels_last.

    It is 1.75 times as fast as torch for 320 channels at 64x64, and 2.6 times for 640 at 32x32, on one thread of an
    Intel Xeon with AMX (``benchmarks/results/layers_float32.json``).

    Strips of images are convolved one by one, so that an image is the same in any batch, and a large one takes little
    extra memory.
    """
    (batch, channels, height, width), depth = image.shape, matrices.shape[2]
    down, across = height // SIDE, width // SIDE
    strip = max(1, MAX_TILES // across)
    padded = image.new_zeros(height + 2, width + 2, channels)
    result = image.new_empty(batch, down, SIDE, across, SIDE, depth)
    for source, target in zip(image, result, strict=True):
        padded[1:-1, 1:-1] = source.permute(1, 2, 0)
        for start in range(0, down, strip):
            rows = target[start : start + strip]
            _convolve_strip(padded[SIDE * start : SIDE * (start + len(rows)) + 2], matrices, rows)
    if bias is not None:
        result += bias
    return result.view(batch, height, width, depth).permute(0, 3, 1, 2)


def _convolve_strip(padded: Tensor, matrices: Tensor, result: Tensor) -> None:
    """Convolve padded rows ``[4 * k + 2, w + 2, C]`` into the result ``[k, 4, w / 4, 4, D]``."""
    (down, _, across, _, depth), (_, wide, channels) = result.shape, padded.shape
    lines = padded.new_empty(LINES, down, wide, channels)
    tiles = padded.new_empty(LINES, LINES, down, across, channels)
    gathered = padded.new_empty(LINES, down, across, SIDE, depth)
    _transform_image(padded.unfold(0, LINES, SIDE).unbind(-1), lines)
    _transform_image(lines.unfold(2, LINES, SIDE).unbind(-1), tiles)
    products = torch.bmm(tiles.view(LINES**2, -1, channels), matrices)
    _transform_result(products.view(LINES, LINES, down, across, depth), gathered.unbind(3))
    _transform_result(gathered, result.unbind(1))


def _transform_image(lines: Sequence[Tensor], out: Tensor) -> None:
    """Write the six sums of six lines, all of one shape: the matrix B, transposed."""
    first, second, third, fourth, fifth, sixth = lines
    torch.add(fifth, first, alpha=4, out=out[0]).sub_(third, alpha=5)
    torch.add(sixth, second, alpha=4, out=out[5]).sub_(fourth, alpha=5)
    for pair, less, times in ((out[1:3], 4, 1), (out[3:5], 1, 2)):
        even = torch.sub(fifth, third, alpha=less, out=pair[0])
        odd = torch.sub(fourth, second, alpha=less, out=pair[1])
        _sum_and_difference(even, odd, times)


def _transform_result(products: Tensor, out: Sequence[Tensor]) -> None:
    """Write four lines of the result from six of products, which are overwritten: the matrix A, transposed."""
    first, near, opposite, far, beyond, last = products
    even, odd = _sum_and_difference(near, opposite, 1)
    wide, narrow = _sum_and_difference(far, beyond, 1)
    torch.add(first, even, out=out[0]).add_(wide)
    torch.add(odd, narrow, alpha=2, out=out[1])
    torch.add(even, wide, alpha=4, out=out[2])
    torch.add(odd, narrow, alpha=8, out=out[3]).add_(last)


def _sum_and_difference(left: Tensor, right: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """``left + times * right`` and ``left - times * right``, in place."""
    left.add_(right, alpha=times)
    return left, torch.sub(left, right, alpha=2 * times, out=right)
