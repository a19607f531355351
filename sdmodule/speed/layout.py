"""The layout in memory that convolutions are fastest in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def channels_last(*modules: nn.Module) -> Iterator[None]:
    """Keep the weights of modules with their channels innermost, and put them back afterwards.

    A convolution then gives its result in that layout too, so that no layer converts.
    """
    weights = [weight for module in modules for weight in module.parameters() if weight.ndim == 4]
    before = [weight.is_contiguous() for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, contiguous in zip(weights, before, strict=True):
            if contiguous:
                weight.data = weight.data.contiguous()
