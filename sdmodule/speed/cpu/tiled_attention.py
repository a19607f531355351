"""Attention as two plain matrix products, tile by tile: some queries of some heads at a time (Rabe and Staats 2021).

Processors that multiply bfloat16 in AVX-512 run plain products several times as fast as torch's fused attention, as
long as the scores between the two products stay in the cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 2**21
"""Scores of a tile: small enough for the caches of two cores (8 MiB in float32)."""

ROUNDED = 1 / 32
"""Most that a score may be rounded by, which changes its exponential by 3% at most."""

OUTLYING = 8
"""Largest deviation from the mean, in mean deviations, at which the mean of the values is still subtracted."""

ALIGNED = 16
"""Number of keys that a product is padded to a multiple of: up to twice as fast as with a prompt's 77."""

SUMS = 8
"""Columns appended to the values that sum up the weights, each of every eighth key, so that their rounding errors
cancel out. 8 of them keep rows aligned."""


def tiled_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without gradients, with an image's scores in the dtype of the query if all are small, else in float32.

    For 4,096 tokens in bfloat16 it is 1.05 (large scores) to 1.84 times (small scores) as fast as torch's fused
    attention on an AMD EPYC of Zen 4 (``benchmarks/results/attention.json``).

    In bfloat16 its error is 0.7 to 1.4 times that of torch's fused attention, or up to twice where a few values are
    many times as large as the others. An image's result does not depend on the rest of its batch.

    Args:
        query: ``[B, H, L, D]``; not float16, in which the sum of weights may overflow.
        key: ``[B, H, M, D]``.
        value: ``[B, H, M, D]``.

    Returns:
        ``[B, H, L, D]``.
    """
    return torch.stack([attend(*image) for image in zip(query, key, value, strict=True)])


@torch.no_grad()
def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one image; softmax is normalized at the end, where there are fewer numbers to divide.

    The mean of a head's values is subtracted before the products and added afterwards. Every query sees it in full
    whatever its weights, and where weights are nearly uniform it is most of the result and would be rounded repeatedly.

    Args:
        query: ``[H, L, D]``.
        key: ``[H, M, D]``.
        value: ``[H, M, D]``.

    Returns:
        ``[H, L, D]``.
    """
    (heads, length, width), key_count = query.shape, key.shape[1]
    bound, precise = largest_score(query, key), torch.promote_types(query.dtype, torch.float32)
    dtype = query.dtype if bound < ROUNDED / (torch.finfo(query.dtype).eps / 2) else precise
    # half of the exponent range is left for the sum and the values
    overflow = not bound < math.log(torch.finfo(dtype).max) / 2
    if key_count % ALIGNED:
        key = F.pad(key, (0, 0, 0, -key_count % ALIGNED))
    count = key.shape[1]
    queries, keys = (
        query.to(dtype).contiguous(),
        key.to(dtype).contiguous().transpose(1, 2),
    )  # or each product would copy them
    values, mean = _values(value, count, dtype)
    together, rows = min(heads, max(1, SCORES // (length * count))), min(length, max(1, SCORES // count))
    scores = query.new_empty(together, rows, count, dtype=dtype)
    result = query.new_empty(heads, length, width + SUMS, dtype=dtype)
    scale = width**-0.5 * math.log2(math.e)  # exp2 is faster than exp
    with exact_products(query.dtype):
        for first in range(0, heads, together):
            group = slice(first, min(first + together, heads))
            for start in range(0, length, rows):
                tile = slice(start, min(start + rows, length))
                weights = scores[: group.stop - first, : tile.stop - start]
                torch.baddbmm(weights, queries[group, tile], keys[group], beta=0, alpha=scale, out=weights)
                if overflow:
                    weights[..., key_count:] = -math.inf
                    weights -= weights.amax(dim=-1, keepdim=True)
                torch.bmm(weights.exp2_(), values[group], out=result[group, tile])
    total = result[..., width:].sum(dim=-1, keepdim=True, dtype=precise)
    return (result[..., :width] / total + mean).to(query.dtype)


def _values(value: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values ``[H, M, D]`` less their mean, with columns that sum up the weights; and the mean.

    Returns:
        ``[H, count, D + SUMS]`` in ``dtype``, zero where keys are padding; and ``[H, 1, D]`` in at least float32.
    """
    (heads, key_count, width), precise = value.shape, torch.promote_types(value.dtype, torch.float32)
    values = value.new_zeros(heads, count, width + SUMS, dtype=dtype)
    mean = value.mean(dim=1, keepdim=True, dtype=precise)
    deviation = (value - mean).abs_()  # an outlier would move the mean away from all others, and round them more
    mean *= deviation.amax(dim=1, keepdim=True) <= OUTLYING * deviation.mean(dim=1, keepdim=True)
    rest = value - mean
    values[:, :key_count, :width] = rest
    mean += rest.sub_(values[:, :key_count, :width]).mean(dim=1, keepdim=True)  # the mean rounding error
    summed, key = torch.arange(SUMS, device=value.device), torch.arange(key_count, device=value.device)
    values[:, :key_count, width:] = key[:, None] % SUMS == summed
    return values, mean


def largest_score(query: Tensor, key: Tensor) -> float:
    """Upper bound of the scores of queries ``[H, L, D]`` and keys ``[H, M, D]``, from their lengths."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    lengths = (tokens.norm(dim=2, dtype=dtype).amax(dim=1) for tokens in (query, key))
    return float(math.prod(lengths).max()) * query.shape[2] ** -0.5


class _FloatProducts:
    """The process-wide precision of float32 products: switched by the first thread, restored by the last."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, "none"

    @contextmanager
    def by_onednn(self) -> Iterator[None]:
        """Compute them with oneDNN inside a ``with`` block; see `exact_products`."""
        matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
        if not hasattr(matmul, "fp32_precision"):
            yield
            return
        with self.lock:
            if self.inside == 0:
                self.before = matmul.fp32_precision
                matmul.fp32_precision = "bf16"
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if (
                    self.inside == 0
                ):  # a value of its own would shadow the general setting, so an inherited one is unset
                    inherited = self.before == torch.backends.mkldnn.fp32_precision
                    matmul.fp32_precision = "none" if inherited else self.before


PRODUCTS = _FloatProducts()


def exact_products(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Compute float32 products with oneDNN, in float32, inside a ``with`` block, if tokens are of dtype bfloat16.

    Torch uses oneDNN once it may round to bfloat16. On x86 processors without matrix units oneDNN does not round, and
    on AMD's it is twice as fast as MKL; others are left alone. Versions of torch without this switch multiply as
    usual, which is as exact and slower. The switch holds for the whole process.
    """
    return PRODUCTS.by_onednn() if dtype == torch.bfloat16 and not onednn_rounds() else nullcontext()


def onednn_rounds() -> bool:
    """Whether oneDNN, where it may, rounds float32 products to bfloat16 on this processor."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("architecture") != "x86_64" or bool(capabilities.get("amx_bf16"))
