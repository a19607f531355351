"""Measure one guided step of Stable Diffusion XL at 1024 pixels: diffusers' best recipe beside this package.

The UNet has the real architecture and random weights in the device's fastest precision; text is given, and nothing is
decoded. Contenders take turns of two steps: the first packs weights, once for all the steps of a run, and is
``first_seconds``; the second counts. The first turn, which tunes kernels, is left out. ``seconds`` is the median of a
step, ``speedup`` the median over the turns of the recipe's seconds divided by the contender's; ``peak_gib`` is the most
memory that the process held during the contender's turns, with the weights (4.8 GiB in 16 bits) and with what the
contenders before it freed, which stays mapped. ``error`` is the relative error (L2) of the latents after the step
against those of the recipe.

Example::

    python benchmarks/xl_step.py --json xl_step.json
    python benchmarks/xl_step.py --quick
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.presets import dtype, preset
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from sdmodule.components.checkpoint import Components
from sdmodule.families.conditioning import Conditioning
from sdmodule.families.stable_diffusion_xl import StableDiffusionXL
from sdmodule.sampling.pipeline import sample_requests
from sdmodule.sampling.requests import build_requests
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.text_conditions import GivenText
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.layout import channels_last
from sdmodule.speed.memory import retain_freed_memory
from sdmodule.tome.token_merging import TokenMerging

CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The UNet of the base model, https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0."""

QUICK: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 1),
    "layers_per_block": 1,
}
"""What is changed of it for a quick run."""

GUIDANCE = 5.0
RECIPE = "diffusers, best recipe"


@dataclass
class Contender:
    """One row of the table: samples latents in one step, in a context of its own."""

    name: str
    sample: Callable[[], tuple[Tensor, float]]
    ready: Callable[[], AbstractContextManager[Any]]


def model(precision: torch.dtype, quick: bool) -> Components:
    """The parts that a step needs, with random weights."""
    changes = QUICK if quick else {}
    torch.manual_seed(0)
    torch.set_default_dtype(precision)  # 5 GB are never held in float32
    try:
        unet = UNet2DConditionModel(**CONFIG | changes).eval().requires_grad_(False)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8,
            scaling_factor=0.13025,
        ).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return Components(unet, vae, None, None, scheduler, "random weights", GUIDANCE, family=StableDiffusionXL())  # type: ignore[arg-type]


def contenders(parts: Components) -> list[Contender]:
    """The recipe, and this package with rounding alone and with half of the tokens merged beside it."""
    side = parts.unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, side, side, generator=generator).to(parts.unet.dtype)
    text = Conditioning(*(torch.randn(2, *shape, generator=generator).to(noise) for shape in ((77, 2048), (1280,))))
    pipe = StableDiffusionXLPipeline(
        parts.vae, None, None, None, None, parts.unet, parts.scheduler, add_watermarker=False
    )  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)

    def recipe() -> tuple[Tensor, float]:
        start = time.perf_counter()
        latents = pipe(
            prompt_embeds=text.hidden_states[1:],
            negative_prompt_embeds=text.hidden_states[:1],
            pooled_prompt_embeds=text.pooled[1:],  # type: ignore[index]
            negative_pooled_prompt_embeds=text.pooled[:1],  # type: ignore[index]
            latents=noise.clone(),
            num_inference_steps=1,
            guidance_scale=GUIDANCE,
            output_type="latent",
        ).images
        return latents, time.perf_counter() - start

    chosen = preset("rounding", "speed.compile=none")
    rounding = SamplingSettings.from_groups(chosen["sampling"], None, chosen["speed"])
    rounding = replace(rounding, scheduler="euler", steps=1, guidance_scale=GUIDANCE)

    def ours(settings: SamplingSettings) -> Contender:
        def sample() -> tuple[Tensor, float]:
            start = time.perf_counter()
            given = GivenText(text[1:2], text[:1])
            made = sample_requests(parts, build_requests(""), settings, noise=noise, text=given, latent=True)
            assert made.latents is not None
            return made.latents, time.perf_counter() - start

        merged = f", tome={settings.merging.engine}" if settings.merging.ratio else ""
        return Contender(f"speed=rounding{merged}", sample, lambda: apply_speed(parts, settings.speed))

    return [
        Contender(RECIPE, recipe, lambda: channels_last(parts.unet)),
        ours(rounding),
        ours(replace(rounding, merging=TokenMerging(ratio=0.5))),
        ours(replace(rounding, merging=TokenMerging(ratio=0.5, engine="window", merge_crossattn=True, merge_mlp=True))),
    ]


@torch.no_grad()
def measure(listed: list[Contender], rounds: int) -> list[dict[str, Any]]:
    """Rows of all contenders, which take turns."""
    seconds: dict[str, list[float]] = {one.name: [] for one in listed}
    firsts: dict[str, list[float]] = {one.name: [] for one in listed}
    peaks: dict[str, float] = dict.fromkeys(seconds, 0.0)
    results: dict[str, Tensor] = {}
    for turn in range(1 + rounds):
        for one in listed:
            with one.ready(), peak_memory() as peak:
                _, first = one.sample()  # memory is mapped, and weights are packed
                results[one.name], took = one.sample()
            firsts[one.name] += [first] if turn else []
            peaks[one.name] = max(peaks[one.name], peak()) if turn else 0.0
            seconds[one.name] += [took] if turn else []
            print(f"{one.name}: {took:.2f} s", file=sys.stderr)
    exact = results[RECIPE].double()
    return [
        {
            "name": name,
            "seconds": round(statistics.median(times), 3),
            "first_seconds": round(statistics.median(firsts[name]), 3),
            "speedup": round(statistics.median(b / t for b, t in zip(seconds[RECIPE], times, strict=True)), 3),
            "peak_gib": round(peaks[name], 2),
            "error": float((results[name].double() - exact).norm() / exact.norm()),
        }
        for name, times in seconds.items()
    ]


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Yields a function that gives the most memory in GiB that this process held since the block began (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    yield lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    parser = Parser("Measure a step of Stable Diffusion XL.", quick="a tiny UNet at 128 pixels, one round")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender")
    settings = parser.parse_args(arguments)
    check_counts(settings, "rounds")
    precision, rounds = dtype("rounding"), 1 if settings.quick else settings.rounds
    with retain_freed_memory():  # as in every preset
        result = report([__file__, *arguments], measure(contenders(model(precision, settings.quick)), rounds))
    result["protocol"] = (
        f"1 image, {precision}, {torch.get_num_threads()} threads, freed memory kept; medians of {rounds}, in turn"
    )
    print(result["protocol"])
    print_table(result["rows"])
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
