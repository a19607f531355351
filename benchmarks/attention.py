"""Measure attention on CPU: torch's kernel beside those of ``sdmodule.speed.cpu``, for small scores and for large ones.

Queries and keys of trained models have larger scores than those of random weights, and the tiled kernel computes large
scores in float32, so both are measured. Errors are relative (L2), against float64.

Example::

    python benchmarks/attention.py --json attention.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from sdmodule.speed.cpu.autotune import TORCH
from sdmodule.speed.cpu.layers import attention_kernels

SHAPES = ((4096, 4096), (4096, 77), (1024, 1024))
"""Queries and keys of Stable Diffusion 1.5 at 512 pixels: self- and cross-attention of the largest layers, and
self-attention of the next ones."""

HEADS, WIDTH = 8, 40
SPREADS = (0.3, 1.0, 4.0)
"""Standard deviations of the scores; the first is about that of random weights."""


def make_inputs(queries: int, keys: int, spread: float, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of two rows, ``[2, HEADS, L, WIDTH]``, with the strides that a layer gives them."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, count, HEADS, WIDTH, generator=generator) for count in (queries, keys, keys)]
    tensors[0] *= spread
    return [tensor.to(dtype).transpose(1, 2) for tensor in tensors]


def measure(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all kernels, which run in turn."""
    rows = []
    for queries, keys in SHAPES[: 1 if settings.quick else None]:
        for spread in SPREADS:
            inputs = make_inputs(queries, keys, spread, getattr(torch, settings.precision))
            kernels = attention_kernels(*inputs)
            exact = kernels[TORCH](*(tensor.double() for tensor in inputs))
            seconds: dict[str, list[float]] = {name: [] for name in kernels}
            errors: dict[str, float] = {}
            for _ in range(1 + settings.rounds):  # the first is the warm-up
                for name, kernel in kernels.items():
                    start = time.perf_counter()
                    result = kernel(*inputs)
                    seconds[name].append(time.perf_counter() - start)
                    errors[name] = float((result.double() - exact).norm() / exact.norm())
            baseline = statistics.median(seconds[TORCH][1:])
            for name, timed in seconds.items():
                median = statistics.median(timed[1:])
                rows.append(
                    {
                        "queries": queries,
                        "keys": keys,
                        "spread_of_scores": spread,
                        "attention": name,
                        "milliseconds": float(f"{median * 1e3:.3g}"),
                        "over_torch": round(baseline / median, 2),
                        "error": float(f"{errors[name]:.2g}"),
                    }
                )
    return rows


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    parser = Parser("Measure attention on CPU.", quick="the largest layers, one round")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each kernel")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    settings = parser.parse_args(arguments)
    check_counts(settings, "rounds")
    settings.rounds = 1 if settings.quick else settings.rounds
    result = report([__file__, *arguments], measure(settings))
    result["protocol"] = (
        f"{HEADS} heads of {WIDTH}, 2 rows, {settings.precision}, {torch.get_num_threads()} threads; "
        f"medians of {settings.rounds}, in turn"
    )
    print(result["protocol"])
    print_table(result["rows"])
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
