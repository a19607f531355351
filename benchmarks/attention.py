"""Measure attention on CPU: torch's own beside the other ways there are here, for small scores and for large ones.

The queries and keys of trained models have larger scores than those of random weights, and tiles then keep them in
float32; so both are measured. Errors are relative (L2), against float64.

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

from benchmarks.report import Parser, print_table, report, write_json
from sdmodule.errors import SettingsError
from sdmodule.speed.cpu.autotune import TORCH
from sdmodule.speed.cpu.kernels import attentions

SHAPES = ((4096, 4096), (4096, 77), (1024, 1024))
"""Queries and keys of Stable Diffusion 1.5 at 512 pixels: of its largest layers, pixels and text, and of the next."""

HEADS, WIDTH = 8, 40
SPREADS = (0.3, 1.0, 4.0)
"""Standard deviations of the scores; of random weights it is about the first."""


def inputs(queries: int, keys: int, spread: float, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of two rows, as a layer has them: heads innermost but for the width."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, count, HEADS, WIDTH, generator=generator) for count in (queries, keys, keys)]
    made[0] *= spread
    return [one.to(dtype).transpose(1, 2) for one in made]


def measure(settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all, in turn, and make a row of each."""
    rows = []
    for queries, keys in SHAPES:
        for spread in SPREADS:
            given = inputs(queries, keys, spread, getattr(torch, settings.precision))
            ways = attentions(*given)
            exact = ways[TORCH](*(one.double() for one in given))
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            errors: dict[str, float] = {}
            for _ in range(1 + settings.rounds):  # the first warms up
                for name, way in ways.items():
                    start = time.perf_counter()
                    result = way(*given)
                    seconds[name].append(time.perf_counter() - start)
                    errors[name] = float((result.double() - exact).norm() / exact.norm())
            peer = statistics.median(seconds[TORCH][1:])
            for name, taken in seconds.items():
                median = statistics.median(taken[1:])
                rows.append(
                    {
                        "queries": queries,
                        "keys": keys,
                        "spread_of_scores": spread,
                        "attention": name,
                        "milliseconds": float(f"{median * 1e3:.3g}"),
                        "over_torch": round(peer / median, 2),
                        "error": float(f"{errors[name]:.2g}"),
                    }
                )
    return rows


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    parser = Parser(description="Measure attention on CPU.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    settings = parser.parse_args(arguments)
    if settings.rounds < 1:
        raise SettingsError(f"--rounds {settings.rounds} is too small; give 1 or more.")
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
    try:
        run(sys.argv[1:])
    except SettingsError as error:
        sys.exit(str(error))
