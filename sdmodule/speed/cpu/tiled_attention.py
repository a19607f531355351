"""Attention by plain products, some queries of some heads at a time, as Rabe and Staats (2021) split it.

Processors with units for bfloat16 run plain products several times faster than torch's fused attention, as long as what
lies between the two products stays in the cache.
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
"""Scores between the two products: of so many, what two cores work on stays close to them (8 MiB in float32)."""

ROUNDED = 1 / 32
"""By how much a score may be rounded: its exponential then is by 3% at most."""

OUTLYING = 8
"""How many times as far from the mean as values are on average one may be; beyond that no mean is taken away."""

ALIGNED = 16
"""Products of numbers of keys that this divides are up to twice as fast as those of a prompt's 77."""

SUMS = 8
"""Columns beside the values in which the weights are summed up, each those of every eighth key: what rounding takes
from the one it gives to the other. Of 8, rows stay aligned."""


def tiled_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, with the scores of an image in the type of its numbers where all are small, or else in float32.

    In bfloat16 its error is 0.7 to 1.4 times that of torch's fused attention, up to twice where a few values are many
    times as large as all others. What is done for an image depends on it alone, not on the others of its batch.
    Without gradients.

    Args:
        query: ``[B, H, L, D]``, not of float16, whose largest number leaves no room for a sum of weights.
        key: ``[B, H, M, D]``.
        value: of the same shape.

    Returns:
        ``[B, H, L, D]``.
    """
    return torch.stack([attend(*image) for image in zip(query, key, value, strict=True)])


@torch.no_grad()
def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one image, whose weights are divided by their sum at the end, when few numbers are left.

    What a head's values have in common goes around the products: all queries see the same of it, however they weigh,
    and where they weigh much alike it is most of what they see, and would be rounded again and again.

    Args:
        query: ``[H, L, D]``.
        key: ``[H, M, D]``.
        value: of the same shape.

    Returns:
        ``[H, L, D]``.
    """
    (heads, length, width), given = query.shape, key.shape[1]
    bound, precise = largest_score(query, key), torch.promote_types(query.dtype, torch.float32)
    dtype = query.dtype if bound < ROUNDED / (torch.finfo(query.dtype).eps / 2) else precise
    # of the exponents that a number can have, half is left to the sum, and to the values
    overflow = not bound < math.log(torch.finfo(dtype).max) / 2
    if given % ALIGNED:
        key = F.pad(key, (0, 0, 0, -given % ALIGNED))
    count = key.shape[1]
    queries, keys = query.to(dtype).contiguous(), key.to(dtype).contiguous().transpose(1, 2)  # or each product copies
    values, common = _values(value, count, dtype)
    together, rows = min(heads, max(1, SCORES // (length * count))), min(length, max(1, SCORES // count))
    scores = query.new_empty(together, rows, count, dtype=dtype)
    result = query.new_empty(heads, length, width + SUMS, dtype=dtype)
    scale = width**-0.5 * math.log2(math.e)  # powers of 2 are computed faster than those of e
    with products_of(query.dtype):
        for first in range(0, heads, together):
            some = slice(first, min(first + together, heads))
            for start in range(0, length, rows):
                these = slice(start, min(start + rows, length))
                weights = scores[: some.stop - first, : these.stop - start]
                torch.baddbmm(weights, queries[some, these], keys[some], beta=0, alpha=scale, out=weights)
                if overflow:
                    weights[..., given:] = -math.inf
                    weights -= weights.amax(dim=-1, keepdim=True)
                torch.bmm(weights.exp2_(), values[some], out=result[some, these])
    total = result[..., width:].sum(dim=-1, keepdim=True, dtype=precise)
    return (result[..., :width] / total + common).to(query.dtype)


def _values(value: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values ``[H, M, D]`` less what a head's have in common, with columns that sum up weights, and what that is.

    Returns:
        ``[H, count, D + SUMS]`` of a type, zero where there is no key, and ``[H, 1, D]``, of float32 or more.
    """
    (heads, given, width), precise = value.shape, torch.promote_types(value.dtype, torch.float32)
    values = value.new_zeros(heads, count, width + SUMS, dtype=dtype)
    common = value.mean(dim=1, keepdim=True, dtype=precise)
    apart = (value - common).abs_()  # of one that is far apart all others would get a share, and be rounded with it
    common *= apart.amax(dim=1, keepdim=True) <= OUTLYING * apart.mean(dim=1, keepdim=True)
    rest = value - common
    values[:, :given, :width] = rest
    common += rest.sub_(values[:, :given, :width]).mean(dim=1, keepdim=True)  # what rounding has taken from them
    summed, key = torch.arange(SUMS, device=value.device), torch.arange(given, device=value.device)
    values[:, :given, width:] = key[:, None] % SUMS == summed
    return values, common


def largest_score(query: Tensor, key: Tensor) -> float:
    """What no score of queries ``[H, L, D]`` and keys ``[H, M, D]`` exceeds, by their lengths."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    lengths = (tokens.norm(dim=2, dtype=dtype).amax(dim=1) for tokens in (query, key))
    return float(math.prod(lengths).max()) * query.shape[2] ** -0.5


class _FloatProducts:
    """How this process computes products of float32: switched by the first of its threads, and restored by the last."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, "none"

    @contextmanager
    def by_onednn(self) -> Iterator[None]:
        """Have oneDNN compute them inside a ``with`` block; see `products_of`."""
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
                if self.inside == 0:  # what is said of all products would not reach these if it were said of them too
                    inherited = self.before == torch.backends.mkldnn.fp32_precision
                    matmul.fp32_precision = "none" if inherited else self.before


PRODUCTS = _FloatProducts()


def products_of(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Let products of numbers of a type be computed in float32 by oneDNN, inside a ``with`` block.

    It is asked for by allowing it to round to bfloat16, which processors of x86 without matrix units do not do; others
    are not asked. AMD's it keeps busy twice as well as MKL does. Versions of torch without such a switch multiply as
    they do, which is as right, and slower. The switch is of the whole process.
    """
    return PRODUCTS.by_onednn() if dtype == torch.bfloat16 and not may_round() else nullcontext()


def may_round() -> bool:
    """Whether oneDNN rounds products of float32 to bfloat16 here once it is allowed to."""
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told.get("architecture") != "x86_64" or bool(told.get("amx_bf16"))
