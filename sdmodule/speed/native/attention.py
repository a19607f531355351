"""Attention in bfloat16 on CPU whose scores never leave the cache, in C++: see ``attention.cpp``."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from sdmodule.speed.native.building import library, place

SOURCE = Path(__file__).with_suffix(".cpp")


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether it computes attention of such tensors."""
    in_pairs = query.shape[-1] % 2 == 0
    return in_pairs and all(one.dtype == torch.bfloat16 and one.stride(-1) == 1 for one in (query, key, value))


def native_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without gradients, on machines that have it.

    Its error was that of torch's fused attention or less wherever it was tried. What is done for a query depends on
    nothing but its picture and head.

    Args:
        query: ``[B, H, L, D]`` in bfloat16, D even and innermost.
        key: ``[B, H, M, D]``.
        value: of the same shape.

    Returns:
        ``[B, H, L, D]``, heads inside tokens.
    """
    pictures, heads, length, width = query.shape
    result = query.new_empty(pictures, length, heads, width).transpose(1, 2)
    tensors = (query, key, value, result)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    library(SOURCE).attention(
        *(place(tensor) for tensor in tensors),
        (ctypes.c_long * 5)(pictures, heads, length, key.shape[2], width),
        (ctypes.c_long * len(strides))(*strides),
        ctypes.c_float(math.log2(math.e) / math.sqrt(width)),  # exponents are of two
    )
    return result
