"""Peak floating-point operations per second of graphics cards."""

from __future__ import annotations

import re

import torch
from lightning.fabric.utilities.throughput import get_available_flops

PEAK_TFLOPS = {
    r"H200 NVL": (60.0, 417.5, 835.5),
    r"H200": (67.0, 494.7, 989.4),
    r"H100 PCIe": (51.2, 378.0, 756.0),
    r"H100 NVL": (60.0, 417.5, 835.5),
    r"H100": (66.9, 494.7, 989.4),
    r"A100": (19.5, 156.0, 312.0),
    r"L40S": (91.6, 183.0, 362.0),
    r"RTX 4090": (82.6, 82.6, 165.2),
    r"RTX 3090": (35.6, 35.6, 71.2),
    r"T4": (8.1, 8.1, 65.0),
}
"""Of a card: in float32, in TF32, and in float16 and bfloat16; of dense matrices, summed in float32 as torch does.

Sources: NVIDIA's data sheets of H200, H100 and L40S, whose figures for sparse matrices are halved, of A100 and of T4;
the whitepapers of the architectures GA102 (RTX 3090) and Ada (RTX 4090), "FP16 Tensor TFLOPS with FP32 Accumulate".
Lightning's table has other figures for most of these, and no name that an H200 or an L40S gives.
"""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak operations per second of a card, or None if it is not known.

    Args:
        device: a CUDA device.
        precision: the trainer's, such as ``bf16-mixed`` or ``32-true``.
    """
    name = torch.cuda.get_device_name(device)
    single = "32" in precision
    for pattern, (float32, tf32, float16) in PEAK_TFLOPS.items():
        if re.search(rf"\b{pattern}(?! (Ti|D|Laptop)\b)(?!\w)", name):
            if single:
                return 1e12 * (float32 if torch.get_float32_matmul_precision() == "highest" else tf32)
            slow = "bf16" in precision and torch.cuda.get_device_capability(device) < (8, 0)  # emulated
            return None if slow else 1e12 * float16
    dtype = torch.float32 if single else torch.bfloat16 if "bf16" in precision else torch.float16
    return get_available_flops(device, dtype)
