"""Attention by plain products, some queries of some heads at a time, as Rabe and Staats (2021) split it.

Processors with units for bfloat16 run plain products several times faster than torch's fused attention, as long as what
lies between the two products stays in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCORES = 2**21
"""Scores between the two products: of so many, what two cores work on stays close to them (4 MiB in bfloat16)."""

ONES = 8
"""Columns of ones beside the values, which sum the weights up on the way; so many that rows stay aligned."""


def tiled_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose weights are divided by their sum at the end, when there are few numbers left to divide.

    Weights are plain exponentials where no score can be so large that they overflow or vanish; elsewhere they are a
    softmax's. What is chosen for a picture depends on it alone, not on the others of its batch.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, M, D]``.
        value: of the same shape.

    Returns:
        ``[B, H, L, D]``.
    """
    batch, heads, length, width = query.shape
    count = key.shape[2]
    queries = (query * width**-0.5).flatten(0, 1)
    keys = key.flatten(0, 1).transpose(1, 2)
    values = value.new_ones(batch * heads, count, width + ONES)
    values[..., :width] = value.flatten(0, 1)
    small = scores_are_small(queries, keys)
    sums = query.new_empty(batch * heads, length, width + ONES)
    together, rows = max(1, SCORES // (length * count)), max(1, SCORES // count)
    for picture in range(0, batch * heads, heads):
        for first in range(picture, picture + heads, together):
            some = slice(first, min(first + together, picture + heads))
            exponentials = bool(small[some].all())
            for start in range(0, length, rows):
                these = slice(start, start + rows)
                scores = queries[some, these].bmm(keys[some])
                weights = scores.exp_() if exponentials else scores.softmax(dim=-1)
                torch.bmm(weights, values[some], out=sums[some, these])
    return (sums[..., :width] / sums[..., width : width + 1]).unflatten(0, (batch, heads))


def scores_are_small(queries: Tensor, keys: Tensor) -> Tensor:
    """Of which heads no score's exponential overflows or vanishes: no product exceeds that of the lengths.

    Args:
        queries: scaled, ``[H, L, D]``.
        keys: ``[H, D, M]``.

    Returns:
        ``[H]``, boolean. A head with what is no number is none of them.
    """
    if queries.dtype == torch.float16:  # whose largest number leaves no room for a sum of exponentials
        return torch.zeros(len(queries), dtype=torch.bool)
    bound = queries.norm(dim=2).amax(dim=1) * keys.norm(dim=1).amax(dim=1)
    return bound < math.log(torch.finfo(queries.dtype).max) / 2  # the rest is left to the sum, and to the values
