"""Measure layers on CPU: torch's kernels beside those of ``sdmodule.speed.cpu``.

Convolutions, linear layers and gated activations of Stable Diffusion 1.5 at 512 pixels, on the two rows of a guided
image, with random weights. Weights are transformed in the warm-up, as in the first step of an image. Errors are
relative (L2), against float64.

Example::

    python benchmarks/layers.py --json layers.json
    python benchmarks/layers.py --precision float32 --json layers_float32.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from sdmodule.speed.cpu.autotune import TORCH
from sdmodule.speed.cpu.kernels import fastest_convolutions, fastest_linears
from sdmodule.speed.cpu.layers import CONVOLUTIONS, TILED_CONVOLUTIONS, geglu_kernels, linear_kernels
from sdmodule.speed.cpu.prepacked import prepacked_convolution
from sdmodule.speed.memory import retain_freed_memory

CONVOLUTION_SHAPES = ((320, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8))
"""Channels in, channels out, and height and width of the 3x3 convolutions."""

LINEAR_SHAPES = ((320, 320, 4096), (1280, 320, 4096), (1280, 1280, 256))
"""Channels in, channels out, and tokens of the linear layers."""

GEGLU_SHAPES = ((320, 1280, 4096), (640, 2560, 1024), (1280, 5120, 256))
"""Channels in, channels out, and tokens of the gated activations."""

Kernels = Mapping[str, Callable[..., Tensor]]


@torch.no_grad()
def measure_layer(layer: nn.Module, inputs: Tensor, kernels: Kernels, rounds: int) -> list[dict[str, Any]]:
    """Rows of a plain layer, named torch, and of other kernels for it, which run in turn."""
    plain, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()(inputs.double())
    kernels = {**kernels, TORCH: lambda inputs, layer: plain(inputs)}
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    errors: dict[str, float] = {}
    with fastest_convolutions(layer), fastest_linears([layer]):
        for _ in range(1 + rounds):  # the first is the warm-up
            for name, kernel in kernels.items():
                start = time.perf_counter()
                result = kernel(inputs, layer)
                seconds[name].append(time.perf_counter() - start)
                errors[name] = float((result.double() - exact).norm() / exact.norm())
    baseline = statistics.median(seconds[TORCH][1:])
    medians = {name: statistics.median(timed[1:]) for name, timed in seconds.items()}
    return [
        {
            "kernel": name,
            "milliseconds": float(f"{median * 1e3:.3g}"),
            "over_torch": round(baseline / median, 2),
            "error": float(f"{errors[name]:.2g}"),
        }
        for name, median in medians.items()
    ]


def measure(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all layers."""
    dtype, rows = getattr(torch, settings.precision), []
    count = 1 if settings.quick else None
    torch.manual_seed(0)
    for channels, out, side in CONVOLUTION_SHAPES[:count]:
        inputs = torch.randn(2, channels, side, side).to(dtype, memory_format=torch.channels_last)
        layer = nn.Conv2d(channels, out, 3, padding=1).to(dtype, memory_format=torch.channels_last)
        tiled = dtype == torch.float32 and side >= 32
        kernels = {TORCH: layer, "packed": prepacked_convolution, **(TILED_CONVOLUTIONS if tiled else CONVOLUTIONS)}
        found = measure_layer(layer, inputs, kernels, settings.rounds)
        rows += [{"layer": "3x3 convolution", "shape": f"{channels} to {out}, {side}x{side}", **row} for row in found]
    for channels, out, tokens in LINEAR_SHAPES[:count]:
        inputs, layer = torch.randn(2, tokens, channels).to(dtype), nn.Linear(channels, out).to(dtype)
        found = measure_layer(layer, inputs, linear_kernels(inputs, layer), settings.rounds)
        rows += [{"layer": "linear", "shape": f"{channels} to {out}, {tokens} tokens", **row} for row in found]
    for channels, out, tokens in GEGLU_SHAPES[:count] if dtype == torch.bfloat16 else ():
        inputs, layer = torch.randn(2, tokens, channels).to(dtype), GEGLU(channels, out).to(dtype)
        found = measure_layer(layer, inputs, geglu_kernels(inputs, layer.proj), settings.rounds)
        rows += [{"layer": "GEGLU", "shape": f"{channels} to {out}, {tokens} tokens", **row} for row in found]
    return rows


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    parser = Parser("Measure layers on CPU.", quick="one shape of each layer, one round")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each kernel")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    settings = parser.parse_args(arguments)
    check_counts(settings, "rounds")
    settings.rounds = 1 if settings.quick else settings.rounds
    with retain_freed_memory():  # as in every preset
        result = report([__file__, *arguments], measure(settings))
    result["protocol"] = (
        f"2 rows, {settings.precision}, {torch.get_num_threads()} threads, freed memory kept; "
        f"medians of {settings.rounds}, in turn"
    )
    print(result["protocol"])
    print_table(result["rows"])
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
