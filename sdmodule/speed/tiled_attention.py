"""Attention by plain products, some queries of some heads at a time, as Rabe and Staats (2021) split it.

Processors with units for bfloat16 run plain products several times faster than torch's fused attention, as long as what
lies between the two products stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SCORES = 2**21
"""Scores between the two products: of so many, what two cores work on stays close to them (8 MiB in float32)."""

ROUNDED = 1 / 32
"""By how much a score may be rounded: its exponential then is by 3% at most."""

SUMS = 8
"""Columns beside the values in which the weights are summed up, each those of every eighth key: what rounding takes
from the one it gives to the other. Of 8, rows stay aligned."""


def tiled_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, with the scores of a picture in the type of its numbers where all are small, or else in float32.

    What is done for a picture depends on it alone, not on the others of its batch. Without gradients.

    Args:
        query: ``[B, H, L, D]``, not of float16, whose largest number leaves no room for a sum of weights.
        key: ``[B, H, M, D]``.
        value: of the same shape.

    Returns:
        ``[B, H, L, D]``.
    """
    small = ROUNDED / (torch.finfo(query.dtype).eps / 2)
    pictures = zip(query, key, value, strict=True)
    return torch.stack([attend(*one, query.dtype if largest_score(*one[:2]) < small else None) for one in pictures])


def accurate_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with all scores in float32, which rounds less than torch's fused attention does, whatever they are."""
    return torch.stack([attend(*one) for one in zip(query, key, value, strict=True)])


@torch.no_grad()
def attend(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Attention of one picture, whose weights are divided by their sum at the end, when few numbers are left.

    Args:
        query: ``[H, L, D]``.
        key: ``[H, M, D]``.
        value: of the same shape.
        dtype: of the scores; float32, or float64 where the numbers are.

    Returns:
        ``[H, L, D]``.
    """
    (heads, length, width), count = query.shape, key.shape[1]
    dtype = dtype or torch.promote_types(query.dtype, torch.float32)
    # of the exponents that a number can have, half is left to the sum, and to the values
    overflow = not largest_score(query, key) < math.log(torch.finfo(dtype).max) / 2
    queries, keys = query.to(dtype).contiguous(), key.to(dtype).contiguous().transpose(1, 2)  # or each product copies
    values = torch.empty(heads, count, width + SUMS, dtype=dtype)
    values[..., :width] = value
    values[..., width:] = torch.arange(count)[:, None] % SUMS == torch.arange(SUMS)
    together, rows = min(heads, max(1, SCORES // (length * count))), min(length, max(1, SCORES // count))
    scores = torch.empty(together, rows, count, dtype=dtype)
    result = torch.empty(heads, length, width + SUMS, dtype=dtype)
    scale = width**-0.5 * math.log2(math.e)  # powers of 2 are computed faster than those of e
    with products_of(query.dtype):
        for first in range(0, heads, together):
            some = slice(first, min(first + together, heads))
            for start in range(0, length, rows):
                these = slice(start, min(start + rows, length))
                weights = scores[: some.stop - first, : these.stop - start]
                torch.baddbmm(weights, queries[some, these], keys[some], beta=0, alpha=scale, out=weights)
                if overflow:
                    weights -= weights.amax(dim=-1, keepdim=True)
                torch.bmm(weights.exp2_(), values[some], out=result[some, these])
    total = result[..., width:].sum(dim=-1, keepdim=True, dtype=torch.promote_types(dtype, torch.float32))
    return (result[..., :width] / total).to(query.dtype)


def largest_score(query: Tensor, key: Tensor) -> float:
    """What no score of queries ``[H, L, D]`` and keys ``[H, M, D]`` exceeds, by their lengths."""
    bounds = query.norm(dim=2).amax(dim=1) * key.norm(dim=2).amax(dim=1)
    return float(bounds.max()) * query.shape[2] ** -0.5


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Take only as much of float32 into products as numbers of a type have, inside a ``with`` block.

    Numbers of bfloat16 lose nothing by it, and their products are summed up and given in float32. It also has oneDNN
    multiply, which on AMD's processors takes half the time that MKL takes. Versions of torch without such a switch
    multiply as they do, which is as right, and slower.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
