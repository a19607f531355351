"""Measure sampling beside its alternatives: seconds of a guided step and of a whole image.

Peers: diffusers as in its README, diffusers with its best documented recipe (bfloat16 where the device computes in it,
channels_last, and compiled), diffusers with tomesd, and the loop of older toolkits. Ours: the presets of ``speed=``.
All run in one process, in turn, after a warm-up that is reported separately; figures are medians.

The architecture is Stable Diffusion 1.5's with random weights, unless ``--pretrained`` names a model. A whole image is
the measured text encoding and decoding plus its steps, each at the median of its kind.

Example::

    python benchmarks/sampling_speed.py --json sampling_speed.json
    python benchmarks/sampling_speed.py --pretrained tiny --batch 4 --json sampling_speed_tiny.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plots import Bar, save_bars
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from benchmarks.sampling_peers import Contender, Run, Work, peers, presets, single_settings
from benchmarks.tome_runs import load, psnr
from sdmodule.cli.trainer import supports_bfloat16
from sdmodule.components.checkpoint import Components
from sdmodule.sampling.metadata import describe
from sdmodule.sampling.settings import SamplingSettings

TARGETS = (
    ("speed=rounding", "step_over_best", 1.3),
    ("speed=rounding", "step_over_diffusers", 2.7),
    ("speed=fast", "step_over_best", 1.6),
    ("speed=turbo", "image_over_diffusers", 8.0),
    ("speed=exact", "step_over_diffusers", 1.0),
)
"""Preset, figure, and its target at 512 pixels on two cores that compute in bfloat16."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options.

    Raises:
        SettingsError: an option is unknown or a value out of range.
    """
    gpu = torch.cuda.is_available()
    parser = Parser("Measure sampling beside its alternatives.", quick="two rounds of a few steps, nothing compiled")
    parser.add_argument("--size", type=int, nargs="+", default=[512, 768, 1024] if gpu else [512], help="pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 5, 16] if gpu else [1], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--pretrained", help="a model; by default Stable Diffusion 1.5 with random weights")
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument(
        "--precision", choices=["bfloat16", "float32"], help="of the best recipe and of all presets but exact"
    )
    parser.add_argument("--single", action="store_true", help="also each speed setting by itself")
    parser.add_argument("--no-compile", action="store_true", help="compile nothing")
    parser.add_argument("--plot", type=Path, help="PNG to plot them in")
    settings = parser.parse_args(arguments)
    settings.whole = settings.pretrained is not None and not settings.quick
    if settings.quick:
        settings.rounds, settings.no_compile = 2, True
    check_counts(settings, "rounds", "size", "batch")
    return settings


def models(pretrained: str | None, precision: str | None = None) -> tuple[Components, Components]:
    """The model in float32, and in ``precision`` or the device's fastest one; the same object if that is float32."""
    plain = load(pretrained, "float32")
    device = plain.unet.device.type
    for network in plain.networks.values():  # as after ``from_pretrained``
        network.to(memory_format=torch.contiguous_format)
    fastest = "bfloat16" if supports_bfloat16("gpu" if device == "cuda" else "cpu") else "float32"
    if (precision or fastest) == "float32":
        return plain, plain
    best = copy.deepcopy(plain)
    for network in best.networks.values():
        network.to(torch.bfloat16)
    return plain, best


class Measured:
    """The measurements of one contender."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.warmup = 0.0
        self.runs: list[Run] = []
        self.steps: dict[Any, list[float]] = {}

    def run(self, work: Work, whole: bool) -> None:
        """Measure once; the first call is the warm-up."""
        contender = self.contender
        steps = contender.steps if whole else contender.enough
        with contender.ready():
            start = time.perf_counter()
            if not self.runs and contender.compiled:
                contender.sample(work, steps)
            run = contender.sample(work, steps)
        if not self.runs:
            self.warmup = time.perf_counter() - start
        self.runs.append(run)
        if len(self.runs) > 1:
            first = 0 if steps == contender.steps else 1  # the first step starts cold
            for kind, seconds in list(zip(contender.plan(steps), run.steps, strict=True))[first:]:
                self.steps.setdefault(kind, []).append(seconds)

    @property
    def step(self) -> float:
        """Median seconds of a step; if steps differ, the mean of the medians over an image."""
        return self._denoising / len(self.contender.kinds)

    @property
    def _denoising(self) -> float:
        medians = {kind: statistics.median(seconds) for kind, seconds in self.steps.items()}
        return sum(medians[kind] for kind in self.contender.kinds)

    @property
    def image(self) -> float:
        """Seconds of a whole batch."""
        runs = self.runs[1:]
        ends = [statistics.median(getattr(run, name) for run in runs) for name in ("text", "decode")]
        return sum(ends) + self._denoising


def measure(plain: Components, best: Components, settings: argparse.Namespace, size: int, batch: int) -> list[Measured]:
    """Run all contenders, in turn."""
    side = size // plain.pixels_per_latent
    noise = torch.randn(batch, plain.vae.config.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    correction = describe(plain, SamplingSettings(), "text2image")["guidance_rescale"]
    work = Work(size, batch, noise, settings.guidance_scale, correction)
    compile = not settings.no_compile
    listed = [*peers(plain, best, compile), *presets(plain, best, compile)]
    listed += single_settings(plain, compile) if settings.single else []
    found = [Measured(one) for one in listed]
    for turn in range(settings.rounds + 1):
        for one in found:
            start = time.perf_counter()
            one.run(work, whole=settings.whole)
            took = time.perf_counter() - start
            print(f"{size} {batch} {turn} {one.contender.name}: {took:.1f} s", file=sys.stderr, flush=True)
    return found


def rows(found: Sequence[Measured], settings: argparse.Namespace, size: int, batch: int) -> list[dict[str, Any]]:
    """A row of each."""
    default, recipe = found[0], found[1]
    exact = next(one for one in found if one.contender.name == "speed=exact").runs[-1].images
    lines = []
    for one in found:
        weights = next(one.contender.parts.unet.parameters())
        row: dict[str, Any] = {
            "size": size,
            "batch": batch,
            "variant": one.contender.name,
            "dtype": str(weights.dtype).removeprefix("torch."),
            "compiled": one.contender.compiled,
            "warmup_seconds": round(one.warmup, 2),
            "steps": one.contender.steps,
            "step_seconds": float(f"{one.step:.4g}"),
            "step_over_diffusers": round(default.step / one.step, 3),
            "step_over_best": round(recipe.step / one.step, 3),
            "image_seconds": float(f"{one.image:.4g}"),
            "image_over_diffusers": round(default.image / one.image, 3),
        }
        images = one.runs[-1].images
        if torch.equal(images, exact):
            row["images"] = "equal to exact"
        elif settings.whole or one.contender.enough == found[0].contender.enough:
            row["psnr_db"] = round(psnr(images, exact), 1)
        lines.append(row)
    return lines


def targets(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, and the figures here."""
    found = []
    for variant, figure, wanted in TARGETS:
        row = next(line for line in lines if line["variant"] == variant)
        measured = row[figure]
        found.append({"variant": variant, "figure": figure, "at_least": wanted, "measured": measured,
                      "met": measured >= wanted, "dtype": row["dtype"]})  # fmt: skip
    return found


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the speed-up of each over diffusers, for steps and for whole images."""
    charts = []
    for size, batch in dict.fromkeys((line["size"], line["batch"]) for line in lines):
        here = [line for line in lines if (line["size"], line["batch"]) == (size, batch)]
        for what in ("step", "image"):
            title = f"{size} pixels, batch {batch}: {what}, speed-up over diffusers"
            bars = [Bar(x["variant"], x[f"{what}_over_diffusers"], "speed=" in x["variant"]) for x in here]
            charts.append((title, bars))
    save_bars(charts, path)


def protocol(plain: Components, best: Components, settings: argparse.Namespace) -> str:
    """What is measured, in which precision, and why."""
    device = plain.unet.device.type
    dtype = str(next(best.unet.parameters()).dtype).removeprefix("torch.")
    why = "which the device computes in"
    if settings.precision:
        why = "as --precision says"
    elif best is plain:
        why = "since the device has no bfloat16 instructions, and emulates it many times slower"
    return (
        f"{plain.source}; {device}, {torch.get_num_threads()} threads; best recipe and rounding in {dtype}, {why}; "
        f"medians of {settings.rounds} rounds, in turn"
    )


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    settings = parse(arguments)
    plain, best = models(settings.pretrained, settings.precision)
    if settings.pretrained:
        native = plain.unet.config.sample_size * plain.pixels_per_latent
        settings.size, settings.guidance_scale = [native], plain.guidance_scale
    print(protocol(plain, best, settings))
    lines: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for size in settings.size:
        for batch in settings.batch:
            lines += rows(measure(plain, best, settings, size, batch), settings, size, batch)
            result = report([__file__, *arguments], lines) | {"protocol": protocol(plain, best, settings)}
            if settings.pretrained is None:
                result["bars"] = targets(lines)
            if settings.json:  # after each, since the next may take long
                write_json(settings.json, result)
    if settings.plot:
        draw(lines, settings.plot)
    print_table(lines)
    if "bars" in result:
        print_table(result["bars"])
    return result


if __name__ == "__main__":
    main(run)
