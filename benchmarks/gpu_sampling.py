"""Section ``sampling`` of ``benchmarks/gpu.py``: this package beside diffusers and tomesd.

Each contender samples whole batches, decoded; the first is the warm-up, which compiles. ``it_per_second`` is the number
of steps over the seconds of the latents alone. PSNR compares with the images of the first contender at that size:
diffusers, in float32 at the first size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import tomesd
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from benchmarks import xl_step
from benchmarks.gpu_run import GpuRun
from benchmarks.presets import dtype, preset
from benchmarks.sampling_peers import PROMPT, pipeline
from benchmarks.tome_runs import psnr
from sdmodule.components.checkpoint import Components
from sdmodule.families.conditioning import Conditioning
from sdmodule.sampling.pipeline import sample_requests
from sdmodule.sampling.requests import build_requests
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.text_conditions import GivenText
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.layout import channels_last

OURS = (
    "speed=exact",
    "speed=rounding",
    "speed=rounding speed.compile=none",
    "speed=fast",
    "speed=turbo",
    "speed=rounding tome=window",
    "speed=rounding speed.cuda_graphs=false",
    "speed=rounding speed.compile=autotuned",
)
"""What ``predict`` is given. A new setting gets a line here: ``"speed=rounding speed.quantize=int8"``."""

SIZES = ((512, 1), (512, 4), (1024, 1))
"""Pixels and batch size; diffusers in float32 and what compiles for minutes run at the first only."""

GUIDANCE = 7.5
STEPS = 50
XL_STEPS = 30
ROUNDS = 3

Sample = Callable[[Tensor, bool], Tensor]
"""Images or, if the flag is set, latents of initial noise ``[B, 4, h, w]``."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: what it is.
        precision: of the weights.
        ready: for a model, a context manager that gives the function to measure and its number of steps.
        seconds: that it takes, compilation included, on an H100-class card.
        everywhere: measured at every size.
        tf32: whether matrix products in float32 may use TF32.
    """

    name: str
    precision: str
    ready: Callable[[Components], AbstractContextManager[tuple[Sample, int]]]
    seconds: float = 12
    everywhere: bool = True
    tf32: bool = True


def contenders(run: GpuRun) -> list[Contender]:
    """All of them: what images are compared with first, and what matters most before time runs out."""
    half = "float32" if run.dry else "float16"
    recipe = partial(best_recipe, compile=not run.dry)
    return [
        Contender("diffusers", "float32", partial(diffusers, run), 20, everywhere=False, tf32=False),
        *[ours(run, words) for words in OURS[:1]],
        Contender("diffusers, 16 bits", half, partial(diffusers, run)),
        Contender("diffusers + tomesd 0.5", half, partial(with_tomesd, run)),
        ours(run, OURS[1]),
        Contender("diffusers, best recipe", half, partial(recipe, run), 80, everywhere=False),
        *[ours(run, words) for words in OURS[2:]],
    ]


def ours(run: GpuRun, words: str) -> Contender:
    """This package with overrides of ``predict``; nothing is compiled in a dry run."""
    name, *more = words.split()
    overrides = [*more, "sampler.eta=0", *(["speed.compile=none"] if run.dry else [])]  # the last one counts
    name = name.removeprefix("speed=")
    chosen = preset(name, *overrides)
    settings = SamplingSettings.from_groups(chosen["sampling"], chosen["tome"], chosen["speed"])
    precision = str(dtype(name, run.trainer, *overrides)).removeprefix("torch.")
    exact, compiled = name == "exact", settings.speed.compile_on(run.device)

    @contextmanager
    def ready(parts: Components) -> Iterator[tuple[Sample, int]]:
        own = replace(settings, guidance_scale=GUIDANCE, guidance_rescale=0.0, steps=run_steps(run, settings.steps))

        def sample(noise: Tensor, latent: bool) -> Tensor:
            height, width = (side * parts.pixels_per_latent for side in noise.shape[-2:])
            requests = build_requests(PROMPT, num_images_per_prompt=len(noise))
            made = sample_requests(
                parts, requests, replace(own, height=height, width=width), noise=noise, latent=latent
            )
            found = made.latents if latent else made.decoded
            assert isinstance(found, Tensor)
            return found

        with apply_speed(parts, settings.speed):
            yield sample, own.steps

    seconds = {"none": 15, "autotuned": 80}.get(compiled, 30)
    return Contender(words, precision, ready, seconds, not exact and compiled != "autotuned", tf32=not exact)


@contextmanager
def diffusers(run: GpuRun, parts: Components) -> Iterator[tuple[Sample, int]]:
    """Diffusers' pipeline with DDIM, as in its README."""
    pipe, steps = pipeline(parts), run_steps(run, STEPS)

    def sample(noise: Tensor, latent: bool) -> Tensor:
        return pipe(
            [PROMPT] * len(noise),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=noise.to(parts.unet.device, parts.unet.dtype),
            output_type="latent" if latent else "pt",
        ).images

    yield sample, steps


@contextmanager
def with_tomesd(run: GpuRun, parts: Components) -> Iterator[tuple[Sample, int]]:
    """Diffusers with half of the tokens merged by tomesd."""
    tomesd.apply_patch(parts.unet, ratio=0.5)
    try:
        with diffusers(run, parts) as found:
            yield found
    finally:
        tomesd.remove_patch(parts.unet)


@contextmanager
def best_recipe(run: GpuRun, parts: Components, compile: bool) -> Iterator[tuple[Sample, int]]:
    """The recipe of diffusers' documentation: 16 bits, channels_last, fused QKV, compiled with max-autotune."""
    with channels_last(parts.unet, parts.vae), diffusers(run, parts) as found:
        parts.unet.fuse_qkv_projections()
        parts.vae.fuse_qkv_projections()
        if compile:
            parts.unet.compile(mode="max-autotune", fullgraph=True)
        yield found


def run_steps(run: GpuRun, steps: int) -> int:
    """Steps of a contender, two in a dry run."""
    return 2 if run.dry else steps


@torch.no_grad()
def sampling(run: GpuRun) -> None:
    """Stable Diffusion 1.5 at every size, then XL."""
    reference: dict[tuple[int, int], Tensor] = {}
    for place, (size, batch) in enumerate(((64, 1),) if run.dry else SIZES):
        for one in contenders(run):
            what = f"{one.name}, {size} pixels, batch {batch}"
            if (place == 0 or one.everywhere) and run.fits(what, 0 if run.dry else one.seconds):
                with run.attempt(what):
                    measure(run, one, what, size, batch, reference)
    if run.fits("XL, 1024 pixels", 0 if run.dry else 40):
        with run.attempt("XL, 1024 pixels"):
            large(run)


def measure(
    run: GpuRun, one: Contender, what: str, size: int, batch: int, reference: dict[tuple[int, int], Tensor]
) -> None:
    """Add the row of a contender; the first at a size gives the images to compare with."""
    parts = run.model(one.precision)
    side = size // parts.pixels_per_latent
    noise = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if one.tf32 else "highest")
    run.empty_memory()
    try:
        with one.ready(parts) as (sample, steps):
            warmup = seconds_of(run, lambda: sample(noise, False))[0]
            rounds = 1 if run.dry else ROUNDS
            latents = [seconds_of(run, lambda: sample(noise, True))[0] for _ in range(rounds)]
            whole, images = zip(*[seconds_of(run, lambda: sample(noise, False)) for _ in range(rounds)], strict=True)
    finally:
        torch.set_float32_matmul_precision(before)
    made = images[-1].float().cpu()
    first = reference.setdefault((size, batch), made)
    run.row(
        what,
        precision=one.precision,
        steps=steps,
        it_per_second=round(steps / statistics.median(latents), 2),
        images_per_second=round(batch / statistics.median(whole), 3),
        peak_memory_gib=run.peak_memory(),
        psnr_db=None if made is first else "equal" if torch.equal(made, first) else round(psnr(made, first), 1),
        warmup_seconds=round(warmup, 1),
    )


def seconds_of(run: GpuRun, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call from idle device to idle device, and its result."""
    start = run.now()
    result = call()
    return run.now() - start, result


def large(run: GpuRun) -> None:
    """Stable Diffusion XL without decoding: diffusers in 16 bits and channels_last, and ``speed=rounding``."""
    precision = torch.float32 if run.dry else torch.float16
    parts = xl_step.model(precision, quick=run.dry)
    parts.unet.to(run.device), parts.vae.to(run.device)
    side, steps = parts.unet.config.sample_size, run_steps(run, XL_STEPS)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, side, side, generator=generator).to(run.device, precision)
    text = Conditioning(*(torch.randn(2, *shape, generator=generator).to(noise) for shape in ((77, 2048), (1280,))))
    pipe = StableDiffusionXLPipeline(
        parts.vae, None, None, None, None, parts.unet, parts.scheduler, add_watermarker=False
    )  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    chosen = preset("rounding", *(["speed.compile=none"] if run.dry else []))
    settings = SamplingSettings.from_groups(chosen["sampling"], None, chosen["speed"])
    settings = replace(settings, scheduler="euler", steps=steps, guidance_scale=xl_step.GUIDANCE)

    def recipe() -> Any:
        return pipe(
            prompt_embeds=text.hidden_states[1:],
            negative_prompt_embeds=text.hidden_states[:1],
            pooled_prompt_embeds=text.pooled[1:],  # type: ignore[index]
            negative_pooled_prompt_embeds=text.pooled[:1],  # type: ignore[index]
            latents=noise.clone(),
            num_inference_steps=steps,
            guidance_scale=xl_step.GUIDANCE,
            output_type="latent",
        ).images

    def own() -> Any:
        given = GivenText(text[1:2], text[:1])
        return sample_requests(parts, build_requests(""), settings, noise=noise, text=given, latent=True).latents

    listed = {
        "XL, diffusers, 16 bits, channels_last": (recipe, lambda: channels_last(parts.unet)),
        "XL, speed=rounding": (own, lambda: apply_speed(parts, settings.speed)),
    }
    for name, (sample, ready) in listed.items():
        run.empty_memory()
        with ready():
            warmup = seconds_of(run, sample)[0]
            seconds = statistics.median(seconds_of(run, sample)[0] for _ in range(1 if run.dry else 2))
        run.row(
            f"{name}, {side * parts.pixels_per_latent} pixels, batch 1",
            steps=steps,
            it_per_second=round(steps / seconds, 2),
            peak_memory_gib=run.peak_memory(),
            warmup_seconds=round(warmup, 1),
        )
