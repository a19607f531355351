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

ROUNDED = 1 / 32
"""By how much a score may be rounded: its exponential then is by 3% at most."""

SUMS = 8
"""Columns beside the values in which the weights are summed up, each those of every eighth key: what rounding takes
from the one it gives to the other. Of 8, rows stay aligned."""


def tiled_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention whose weights are divided by their sum at the end, when there are few numbers left to divide.

    Weights are the exponentials of the scores where all of these are small. Elsewhere the largest score of each query
    is taken from the others as they are computed again: nothing overflows, and rounding is small where a weight is
    large. What is done for a picture depends on it alone, not on the others of its batch.

    Args:
        query: ``[B, H, L, D]``, not of float16, whose largest number leaves no room for a sum of weights.
        key: ``[B, H, M, D]``.
        value: of the same shape.

    Returns:
        ``[B, H, L, D]``.
    """
    batch, heads, length, width = query.shape
    count = key.shape[2]
    scale = width**-0.5
    queries, keys = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    values = value.new_empty(batch * heads, count, width + SUMS)
    values[..., :width] = value.flatten(0, 1)
    values[..., width:] = torch.arange(count)[:, None] % SUMS == torch.arange(SUMS)
    bounds = largest_scores(queries, keys) * scale
    result = query.new_empty(batch * heads, length, width + SUMS)
    together, rows = max(1, SCORES // (length * count)), max(1, SCORES // count)
    for picture in range(0, batch * heads, heads):
        for first in range(picture, picture + heads, together):
            some = slice(first, min(first + together, picture + heads))
            bound = float(bounds[some].max())
            for start in range(0, length, rows):
                these = slice(start, start + rows)
                weights = exponentials(queries[some, these], keys[some], scale, bound)
                torch.bmm(weights, values[some], out=result[some, these])
    total = result[..., width:].sum(dim=-1, keepdim=True, dtype=torch.promote_types(query.dtype, torch.float32))
    return (result[..., :width] / total).to(query.dtype).unflatten(0, (batch, heads))


def exponentials(queries: Tensor, keys: Tensor, scale: float, bound: float) -> Tensor:
    """Weights of keys ``[H, D, M]`` for queries ``[H, L, D]``, up to a factor for each query: ``[H, L, M]``.

    Args:
        queries: some of a picture's.
        keys: all of its.
        scale: of their products, the scores.
        bound: which no score exceeds.
    """
    numbers = torch.finfo(queries.dtype)
    # what is rounded by little; and of what can be a number, half is left to the sum, and to the values
    small = min(ROUNDED / (numbers.eps / 2), math.log(numbers.max) / 2)
    scores = torch.baddbmm(queries.new_empty(1, 1, 1), queries, keys, beta=0, alpha=scale)
    if bound < small:
        return scores.exp_()
    if bound * numbers.eps / 2 < small:  # so that none exceeds by much the largest, which was rounded
        largest = scores.amax(dim=-1, keepdim=True)
        return torch.baddbmm(largest, queries, keys, beta=-1, alpha=scale, out=scores).exp_()
    return torch.bmm(queries.float(), keys.float()).mul_(scale).softmax(dim=-1).to(queries.dtype)


def largest_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """What no product of a head's queries ``[H, L, D]`` and keys ``[H, D, M]`` exceeds, that of lengths: ``[H]``."""
    return queries.norm(dim=2).amax(dim=1) * keys.norm(dim=1).amax(dim=1)
