"""TF32, in which GPUs multiply float32 matrices several times faster: float32's range, 10 bits of its fraction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sdmodule.speed.speed_settings import SpeedSettings


def uses_tf32(device: str, speed: SpeedSettings | None = None) -> bool:
    """Whether float32 matrices are multiplied in TF32.

    Args:
        device: type of the device, such as ``cuda``.
        speed: how images are sampled; None in training.
    """
    return device == "cuda" and (speed is None or speed.kernels == "fastest")


@contextmanager
def tf32() -> Iterator[None]:
    """Multiply float32 matrices in TF32 inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
