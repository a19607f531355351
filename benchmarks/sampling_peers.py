"""The alternatives that sampling is compared with, and this package's presets, each sampling and timing a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import tomesd
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from benchmarks.presets import preset
from sdmodule.components.checkpoint import Components
from sdmodule.components.schedulers import make_scheduler
from sdmodule.diffusion.guidance import classifier_free_guidance, rescale_guidance
from sdmodule.sampling.pipeline import sample_requests
from sdmodule.sampling.requests import build_requests
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.compile import compiled
from sdmodule.speed.layout import channels_last
from sdmodule.speed.steps import plan_steps

PROMPT = "a red circle on a blue background"
STEPS = 50
"""DDIM steps of the reference images."""


@dataclass(frozen=True)
class Work:
    """What each contender samples: B images of a size in pixels, from noise ``[B, 4, h, w]``."""

    size: int
    batch: int
    noise: Tensor
    guidance: float
    guidance_rescale: float = 0.0


@dataclass
class Run:
    """One batch: images ``[B, 3, H, W]`` in [0, 1], and seconds of text, of each step, and of decoding."""

    images: Tensor
    text: float
    steps: list[float]
    decode: float


@dataclass
class Contender:
    """One row of the table.

    Attributes:
        name: name of the variant.
        parts: its model.
        sample: samples work in a number of steps.
        steps: steps of a whole image.
        plan: the kind of each step, for a number of steps; steps of a kind take equally long.
        ready: context manager to measure in.
        compiled: whether its first steps compile.
    """

    name: str
    parts: Components
    sample: Callable[[Work, int], Run]
    steps: int = STEPS
    plan: Callable[[int], list[Any]] = lambda steps: [True] * steps
    ready: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiled: bool = False

    @property
    def kinds(self) -> list[Any]:
        """Kinds of the steps of a whole image."""
        return self.plan(self.steps)

    @property
    def enough(self) -> int:
        """Fewest steps that contain each kind after the first step, which starts cold."""
        every = set(self.kinds)
        return next((n for n in range(3, self.steps) if every <= set(self.plan(n)[1:])), self.steps)


def peers(plain: Components, best: Components, compile: bool) -> list[Contender]:
    """The alternatives; ratios are over the first, and over the second, the best recipe without compilation.

    Args:
        plain: the model in float32.
        best: the model in the precision of the best recipe; the same object if that is float32.
        compile: include the best recipe compiled.
    """
    pipe, recipe = pipeline(plain), pipeline(best)

    @contextmanager
    def with_tomesd() -> Iterator[None]:
        tomesd.apply_patch(pipe, ratio=0.5)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)

    @contextmanager
    def unfused_attention() -> Iterator[None]:
        before = plain.unet.attn_processors
        plain.unet.set_attn_processor(AttnProcessor())
        try:
            yield
        finally:
            plain.unet.set_attn_processor(before)

    def layout() -> AbstractContextManager[None]:
        return channels_last(best.unet, best.vae)

    @contextmanager
    def compiled_recipe() -> Iterator[None]:
        with layout(), compiled(best.unet, "whole"):
            yield

    found = [
        Contender("diffusers", plain, lambda work, steps: by_pipeline(pipe, work, steps)),
        Contender("diffusers, best recipe", best, lambda work, steps: by_pipeline(recipe, work, steps), ready=layout),
        Contender("diffusers + tomesd", plain, lambda work, steps: by_pipeline(pipe, work, steps), ready=with_tomesd),
        Contender("older loop", plain, lambda work, steps: by_older_loop(plain, work, steps), ready=unfused_attention),
    ]
    if compile:
        name = "diffusers, best recipe, compiled"
        found.insert(2, Contender(name, best, found[1].sample, ready=compiled_recipe, compiled=True))
    return found


def presets(plain: Components, best: Components, compile: bool) -> list[Contender]:
    """This package's presets; without ``compile`` none compiles."""
    found = []
    for name in ("exact", "rounding", "fast", "turbo"):
        chosen = preset(name, "sampler.eta=0", *([] if compile else ["speed.compile=none"]))
        settings = SamplingSettings.from_groups(chosen["sampling"], chosen["tome"], chosen["speed"])
        found.append(contender(f"speed={name}", plain if name == "exact" else best, settings))
    return found


SINGLE_SETTINGS: dict[str, dict[str, Any]] = {
    "keep_memory=false": {"keep_memory": False},
    "channels_last": {"channels_last": True},
    "kernels=fastest": {"kernels": "fastest"},
    "compile=blocks": {"compile": "blocks"},
    "cache_every=2": {"cache_every": 2},
    "guidance_interval": {"guidance_interval": [0.0, 0.75]},
}
"""Single settings on top of ``speed=exact``."""


def single_settings(parts: Components, compile: bool) -> list[Contender]:
    """Each speed setting by itself; without ``compile`` the one that compiles is left out."""
    chosen = preset("exact")
    found = []
    for name, change in SINGLE_SETTINGS.items():
        if compile or "compile" not in change:
            settings = SamplingSettings.from_groups(chosen["sampling"], chosen["tome"], {**chosen["speed"], **change})
            found.append(contender(f"exact, {name}", parts, settings))
    return found


def contender(name: str, parts: Components, settings: SamplingSettings) -> Contender:
    """This package with some settings."""

    def plan(steps: int) -> list[Any]:
        scheduler = make_scheduler(settings.scheduler, parts.scheduler.config)
        scheduler.set_timesteps(steps)
        return list(plan_steps(scheduler.timesteps, len(scheduler.alphas_cumprod), settings.speed, guided=True))

    def sample(work: Work, steps: int) -> Run:
        size = {"height": work.size, "width": work.size}
        own = replace(
            settings, **size, steps=steps, guidance_scale=work.guidance, guidance_rescale=work.guidance_rescale
        )
        requests = build_requests(PROMPT, num_images_per_prompt=work.batch)
        samples = sample_requests(parts, requests, own, noise=work.noise)
        return Run(samples.decoded, samples.seconds["text"], samples.step_seconds, samples.seconds["decode"])

    return Contender(
        name,
        parts,
        sample,
        steps=settings.steps,
        plan=plan,
        ready=lambda: apply_speed(parts, settings.speed),
        compiled=settings.speed.compile_on(parts.unet.device.type) != "none",
    )


def pipeline(parts: Components) -> StableDiffusionPipeline:
    """Diffusers' pipeline with DDIM."""
    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=make_scheduler("ddim", parts.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def by_pipeline(pipe: StableDiffusionPipeline, work: Work, steps: int) -> Run:
    """A batch with diffusers' pipeline; its callback times the steps."""
    marks = [now(pipe.device)]
    prompts, negatives = pipe.encode_prompt(PROMPT, pipe.device, work.batch, True)
    marks.append(now(pipe.device))

    def stepped(_: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        marks.append(now(pipe.device))
        return kept

    images = pipe(
        prompt_embeds=prompts,
        negative_prompt_embeds=negatives,
        num_images_per_prompt=1,
        num_inference_steps=steps,
        guidance_scale=work.guidance,
        guidance_rescale=work.guidance_rescale,
        latents=work.noise.to(prompts),
        output_type="pt",
        callback_on_step_end=stepped,
    ).images
    end = now(pipe.device)
    between = [after - before for before, after in pairwise(marks[1:])]
    return Run(images.float().cpu(), marks[1] - marks[0], between, end - marks[-1])


@torch.no_grad()
def by_older_loop(parts: Components, work: Work, steps: int) -> Run:
    """The loop of toolkits older than fused attention: DDIM, both halves in one batch, texts encoded every time."""
    device = parts.unet.device
    scheduler = make_scheduler("ddim", parts.scheduler.config)
    scheduler.set_timesteps(steps)
    start = now(device)
    tokens = parts.tokenizer([""] * work.batch + [PROMPT] * work.batch, padding="max_length", return_tensors="pt")
    text = parts.text_encoder(tokens.input_ids.to(device))[0]
    marks, latents = [now(device)], work.noise.to(text)
    for timestep in scheduler.timesteps:
        both = parts.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=text).sample
        unconditional, conditional = both.chunk(2)
        predicted = classifier_free_guidance(unconditional, conditional, work.guidance)
        predicted = (
            rescale_guidance(predicted, conditional, work.guidance_rescale) if work.guidance_rescale else predicted
        )
        latents = scheduler.step(predicted, timestep, latents).prev_sample
        marks.append(now(device))
    images = parts.vae.decode(latents / parts.vae.config.scaling_factor).sample / 2 + 0.5
    end = now(device)
    between = [after - before for before, after in pairwise(marks)]
    return Run(images.clamp(0, 1).float().cpu(), marks[0] - start, between, end - marks[-1])


def now(device: torch.device) -> float:
    """The time once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
