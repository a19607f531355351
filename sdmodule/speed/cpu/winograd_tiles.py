"""Convolutions of 3x3 in float32 with a quarter of the products.

Sixteen numbers of a result, four rows of four, take 144 products for each pair of channels. Winograd's algorithm
F(4x4, 3x3) takes 36, of sums of the six rows of six that they come from and of sums of the kernel's numbers (Lavin and
Gray 2016, "Fast Algorithms for Convolutional Neural Networks", sections 4.2 and 4.3). In float32 the error is 3 to 4
millionths of a result, where ordinary convolutions, by processor, have 0.2 to 2, measured with 320 to 1,920 channels.
In bfloat16 it would be far too large; ``winograd.py`` has a smaller algorithm for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdmodule.speed.cpu.winograd import is_ordinary

SIDE, LINES = 4, 6
"""Of a tile of the result, and of what it comes from."""

PIXELS = 1024
"""The fewest of an image. Weights are kept four times as large, and layers of smaller images have most of them."""

TILES = 512
"""At most so many are multiplied at once."""

KERNEL_SUMS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
"""The matrix G of the algorithm: what is multiplied stands for three lines of the kernel. `_spread` and `_gather` are
its matrices for images and results."""


def is_tiled(layer: nn.Conv2d, image: Tensor) -> bool:
    """Whether a convolution of an image ``[B, C, h, w]`` is one of 3x3 in float32 to the same, large enough size.

    None is where products of float32 may be rounded, as ``torch.set_float32_matmul_precision`` allows: ordinary
    convolutions are not, and what is multiplied here must not be.
    """
    height, width = image.shape[2:]
    large = height * width >= PIXELS and height % SIDE == width % SIDE == 0
    return large and image.dtype == torch.float32 and is_ordinary(layer, image) and products_are_exact()


def products_are_exact() -> bool:
    """Whether nobody has allowed products of float32 on CPU to be rounded."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):  # of older versions of torch
        return torch.get_float32_matmul_precision() == "highest"
    return matmul.fp32_precision in ("none", "ieee")


def matrices_of(layer: nn.Conv2d) -> Tensor:
    """What tiles are multiplied with in place of a kernel ``[D, C, 3, 3]``: ``[36, C, D]``."""
    sums = torch.tensor(KERNEL_SUMS, dtype=layer.weight.dtype, device=layer.weight.device)
    kernel = layer.weight.permute(3, 2, 1, 0)  # the width first, as tiles lie
    return (torch.kron(sums, sums) @ kernel.flatten(2).flatten(0, 1)).view(LINES**2, *kernel.shape[2:])


def convolve(image: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution of 3x3 gives for an image ``[B, C, h, w]``; channels come innermost.

    Strips of images are convolved one by one: an image is the same whatever its batch, and a large one takes little
    memory besides.
    """
    (batch, channels, height, width), depth = image.shape, matrices.shape[2]
    down, across = height // SIDE, width // SIDE
    strip = max(1, TILES // across)
    padded = image.new_zeros(height + 2, width + 2, channels)
    result = image.new_empty(batch, down, SIDE, across, SIDE, depth)
    for one, made in zip(image, result, strict=True):
        padded[1:-1, 1:-1] = one.permute(1, 2, 0)
        for start in range(0, down, strip):
            these = made[start : start + strip]
            _convolve_strip(padded[SIDE * start : SIDE * (start + len(these)) + 2], matrices, these)
    if bias is not None:
        result += bias
    return result.view(batch, height, width, depth).permute(0, 3, 1, 2)


def _convolve_strip(padded: Tensor, matrices: Tensor, result: Tensor) -> None:
    """Write what rows ``[4 * k + 2, w + 2, C]`` give to ``[k, 4, w / 4, 4, D]``."""
    (down, _, across, _, depth), (_, wide, channels) = result.shape, padded.shape
    lines = padded.new_empty(LINES, down, wide, channels)
    tiles = padded.new_empty(LINES, LINES, down, across, channels)
    gathered = padded.new_empty(LINES, down, across, SIDE, depth)
    _spread(padded.unfold(0, LINES, SIDE).unbind(-1), lines)
    _spread(lines.unfold(2, LINES, SIDE).unbind(-1), tiles)
    products = torch.bmm(tiles.view(LINES**2, -1, channels), matrices)
    _gather(products.view(LINES, LINES, down, across, depth), gathered.unbind(3))
    _gather(gathered, result.unbind(1))


def _spread(given: Sequence[Tensor], made: Tensor) -> None:
    """Write the six sums of six lines that are multiplied, all of one shape: the matrix B, transposed."""
    first, second, third, fourth, fifth, sixth = given
    torch.add(fifth, first, alpha=4, out=made[0]).sub_(third, alpha=5)
    torch.add(sixth, second, alpha=4, out=made[5]).sub_(fourth, alpha=5)
    for two, less, times in ((made[1:3], 4, 1), (made[3:5], 1, 2)):
        even = torch.sub(fifth, third, alpha=less, out=two[0])
        odd = torch.sub(fourth, second, alpha=less, out=two[1])
        _sum_and_difference(even, odd, times)


def _gather(products: Tensor, made: Sequence[Tensor]) -> None:
    """Write four lines of a result, of the shape of the six of products, which are lost: the matrix A, transposed."""
    first, near, opposite, far, beyond, last = products
    even, odd = _sum_and_difference(near, opposite, 1)
    wide, narrow = _sum_and_difference(far, beyond, 1)
    torch.add(first, even, out=made[0]).add_(wide)
    torch.add(odd, narrow, alpha=2, out=made[1])
    torch.add(even, wide, alpha=4, out=made[2])
    torch.add(odd, narrow, alpha=8, out=made[3]).add_(last)


def _sum_and_difference(left: Tensor, right: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Of one and so many times the other, in their place."""
    left.add_(right, alpha=times)
    return left, torch.sub(left, right, alpha=2 * times, out=right)
