"""Torch's attention on keys padded to a number that matrix units like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmodule.speed.cpu.tiled_attention import ALIGNED


def padded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's fused attention with keys padded to a multiple of `ALIGNED`; the padding is masked.

    A prompt has 77 tokens. In bfloat16 torch's matrix products of such an odd size are slow: for 4,096 queries this is
    1.5 times as fast as torch's attention on an Intel Xeon with AMX (``benchmarks/results/attention_amx.json``).

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, M, D]``.
        value: ``[B, H, M, D]``.

    Returns:
        ``[B, H, L, D]``.
    """
    padding = -key.shape[2] % ALIGNED
    mask = query.new_zeros(1, 1, 1, key.shape[2] + padding)
    mask[..., key.shape[2] :] = -torch.inf
    key, value = (F.pad(tokens, (0, 0, 0, padding)) for tokens in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
