"""Measure token merging: speed and error of tomesd and of this package's engines.

The default is the published protocol (Bolya and Hoffman 2023, table 1): 512 pixels, 100 images in 20 calls of 5 images
of one prompt, 50 DDIM steps, ratios 0.5 and 0.75. ``--forward-only`` times single calls of the UNet instead, on the two
halves of one guided image, with another seed in each round: always the second call, since all steps of an image but the
first are like it. All variants run in one process, in turn, after a warm-up; figures are medians of times and means of
errors.

Example::

    python benchmarks/tome_speed.py --size 512 --forward-only --json tome_speed.json --plot tome_speed.png
    python benchmarks/tome_speed.py --images 5 --steps 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plots import Line, Panel, save_panels
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from benchmarks.tome_runs import (
    EAGER,
    ENGINES,
    IMAGES_PER_CALL,
    MODES,
    Variant,
    forward,
    forward_error,
    images,
    in_mode,
    load,
    psnr,
    relative_error,
    variants,
)
from sdmodule.cli.trainer import supports_bfloat16
from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError
from sdmodule.tome.token_merging import OFF

PROTOCOL = {"size": 512, "images": 100, "steps": 50}
"""The published protocol."""

PUBLISHED = {0.5: 542.20 / 427.65, 0.75: 542.20 / 393.05}
"""Speed-ups of tomesd by its README: ratios of seconds on an RTX 3090 in float32."""

TARGETS = (("exact", 0.5, 1.10), ("window, whole block", 0.5, 1.25))
"""Engine, ratio, and its target speed-up over tomesd at 512 pixels."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    parser = Parser("Measure token merging: speed and error.", quick="one ratio, one round, one image of two steps")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="pixels, such as 512 768 1024")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75], help="merge ratios")
    parser.add_argument("--forward-only", action="store_true", help="time single calls of the UNet")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each variant, with --forward-only")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for shared machines, with --forward-only"
    )
    parser.add_argument("--images", type=int, default=PROTOCOL["images"], help="images of each variant")
    parser.add_argument("--steps", type=int, default=PROTOCOL["steps"], help="DDIM steps of an image")
    parser.add_argument("--precision", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="also each variant with compiled blocks")
    parser.add_argument("--max-downsample", type=int, default=1, help="tome.max_downsample")
    parser.add_argument("--pretrained", help="a model; by default Stable Diffusion 1.5 with random weights")
    parser.add_argument("--plot", type=Path, help="PNG to plot speed-up over ratio and error over speed-up in")
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.ratios, settings.rounds, settings.images, settings.steps = [0.5], 1, 1, 2
    if settings.clock == "cpu" and not (settings.forward_only and not torch.cuda.is_available()):
        raise SettingsError("--clock cpu: only for calls of the UNet on a CPU; add --forward-only, or leave it out.")
    check_counts(settings, "rounds", "images", "steps")
    return settings


def label(variant: Variant, error: float) -> str:
    """Whether a variant's result is equal to the bit (exact), equal but for rounding, or lossy."""
    if error == 0.0:
        return "exact"
    return "lossy" if variant.merging.ratio else "rounding"


def measure(parts: Components, settings: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """Rows of all variants at one size, which run in turn."""
    listed = variants(settings.ratios, settings.max_downsample, settings.compile)
    # errors of merging are against the same mode unmerged, and those of a mode against eager
    unmerged = {v: Variant("none", OFF, v.mode if v.merging.ratio else EAGER) for v in listed}
    times: dict[Variant, list[float]] = {variant: [] for variant in listed}
    errors: dict[Variant, list[float]] = {variant: [] for variant in listed}
    results: dict[Variant, Tensor] = {}

    def timed(variant: Variant, run: Callable[..., tuple[float, Tensor]]) -> None:
        seconds, result = run(parts, variant, size)
        times[variant].append(seconds)
        results[variant] = result.float().cpu()
        line = f"{size} {variant.mode} {variant.name} {variant.merging.ratio} {seconds:.2f} s"
        print(line, file=sys.stderr, flush=True)

    if settings.forward_only:
        for turn in range(settings.rounds + 1):
            for mode, variants_of_mode in groupby(listed, key=lambda variant: variant.mode):
                with in_mode(parts.unet, mode):
                    for variant in variants_of_mode:
                        timed(variant, partial(forward, clock=settings.clock, seed=turn))
            for variant in listed:
                errors[variant].append(relative_error(results[variant], results[unmerged[variant]]))
        for taken in times.values():
            del taken[0]  # the warm-up
    else:
        for variant in listed:  # two steps of one image warm up
            images(parts, variant, size, images=1, steps=2)
        for variant in listed:
            timed(variant, partial(images, images=settings.images, steps=settings.steps))
            errors[variant].append(forward_error(parts, variant, size, unmerged[variant]))
    peers = {(v.mode, v.merging.ratio): v for v in listed if v.name == "tomesd"}
    rows = []
    for v in listed:
        peer = peers.get((v.mode, v.merging.ratio))
        found = row(settings, size, v, times, errors[v], results[v], results[unmerged[v]])
        if peer not in (None, v) and len(errors[v]) > 1 and all(errors[peer]):
            found["error_over_tomesd"] = compare_errors(errors[v], errors[peer])
        rows.append(found)
    return rows


def compare_errors(errors: Sequence[float], peer: Sequence[float]) -> str:
    """Percent by which errors exceed a peer's on the same inputs: mean and standard error."""
    percent = [100 * (error / other - 1) for error, other in zip(errors, peer, strict=True)]
    return f"{statistics.mean(percent):+.1f}% ± {statistics.stdev(percent) / len(percent) ** 0.5:.1f}"


def row(
    settings: argparse.Namespace,
    size: int,
    variant: Variant,
    times: dict[Variant, list[float]],
    errors: Sequence[float],
    result: Tensor,
    plain: Tensor,
) -> dict[str, Any]:
    """One row of the table; speed-ups are over the same mode unmerged, and over tomesd in this mode and eager."""
    error = statistics.mean(errors)
    medians = {v: statistics.median(t) for v, t in times.items()}
    own = [v for v in medians if v.mode == variant.mode]
    peers = {v.mode: v for v in medians if v.name == "tomesd" and v.merging.ratio == variant.merging.ratio}
    found: dict[str, Any] = {
        "size": size,
        "mode": variant.mode,
        "engine": variant.name,
        "ratio": variant.merging.ratio,
        "seconds": round(medians[variant], 3),
        "speed_up": round(medians[own[0]] / medians[variant], 3),
    }
    if peers:
        found["over_tomesd"] = round(medians[peers[variant.mode]] / medians[variant], 3)
        found["over_tomesd_eager"] = round(medians[peers[EAGER]] / medians[variant], 3)
    found |= {"error": float(f"{error:.3g}"), "label": label(variant, error)}
    if not settings.forward_only:
        found["psnr_db"] = None if torch.equal(result, plain) else round(psnr(result, plain), 1)
    if variant.name == "tomesd" and variant.merging.ratio in PUBLISHED:
        found["published_speed_up"] = round(PUBLISHED[variant.merging.ratio], 3)
    return found


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of engines and their figures here, against tomesd as released, with both errors."""
    at = {(r["engine"], r["ratio"]): r for r in rows if (r["size"], r["mode"]) == (512, EAGER)}
    found = []
    for engine, ratio, wanted in TARGETS:
        if (engine, ratio) in at:
            row, peer = at[engine, ratio], at["tomesd", ratio]
            measured = row["over_tomesd"]
            found.append({"engine": engine, "ratio": ratio, "over_tomesd": measured, "at_least": wanted,
                          "met": measured >= wanted, "error": row["error"], "error_of_tomesd": peer["error"],
                          "error_over_tomesd": row.get("error_over_tomesd")})  # fmt: skip
    return found


def protocol(parts: Components, settings: argparse.Namespace) -> str:
    """What is timed, and how it differs from the published protocol."""
    device = parts.unet.device.type
    where = f"{parts.source}, {settings.precision}, channels_last, {device}, {torch.get_num_threads()} threads"
    if settings.precision == "bfloat16" and device == "cpu" and not supports_bfloat16(device):
        where += (
            "; this processor has no bfloat16 instructions: matrix products are several times slower than in float32"
        )
    if settings.forward_only:
        return f"the second call of the UNet on 2 rows, median of {settings.rounds}, {settings.clock} clock; {where}"
    short = [f"{key} {getattr(settings, key)} of {PROTOCOL[key]}" for key in ("images", "steps")
             if getattr(settings, key) < PROTOCOL[key]]  # fmt: skip
    what = f"shortened: {', '.join(short)}" if short else "the published protocol"
    return f"{what}, {IMAGES_PER_CALL} images a call; {where}"


def draw(rows: Sequence[dict[str, Any]], size: int, path: Path) -> None:
    """Plot speed-up over ratio and error over speed-up at one size: one line per engine, one row of plots per mode."""
    panels = []
    for mode in MODES:
        over_ratio, over_speed = [], []
        for name in ENGINES:
            of_name = [r for r in rows if (r["size"], r["mode"], r["engine"]) == (size, mode, name)]
            over_ratio.append(Line(name, [(0.0, 1.0)] + [(r["ratio"], r["speed_up"]) for r in of_name]))
            over_speed.append(Line(name, [(1.0, 0.0)] + [(r["speed_up"], r["error"]) for r in of_name]))
        if any(row["mode"] == mode for row in rows):
            panels += [
                Panel(f"Speed-up over ratio, {size} pixels, {mode}", "ratio", "speed-up", over_ratio),
                Panel(f"Error over speed-up, {mode}", "speed-up", "relative error of the UNet's output", over_speed),
            ]
    save_panels(panels, path, columns=2)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Args:
        arguments: what was typed after the name of the program.

    Returns:
        The report, with what was timed in ``protocol``.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    variants(settings.ratios, settings.max_downsample, settings.compile)  # checks the ratios before anything slow
    parts = load(settings.pretrained, settings.precision)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    print(protocol(parts, settings))
    for size in settings.size:
        rows += measure(parts, settings, size)
        result = report([__file__, *arguments], rows) | {
            "protocol": protocol(parts, settings),
            "bars": targets(rows) if settings.forward_only else [],
        }
        if settings.json:  # after every size, since the next may take hours
            write_json(settings.json, result)
    print_table(rows)
    if result["bars"]:
        print_table(result["bars"])
    if settings.plot:
        draw(rows, settings.size[0], settings.plot)
    return result


if __name__ == "__main__":
    main(run)
