"""From prompts to images: settings, checks, and the sampling of one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdmodule.components.schedulers import make_scheduler, resolve
from sdmodule.conditioning.control import prepare_control
from sdmodule.conditioning.inpaint import is_inpaint_unet
from sdmodule.conditioning.inpaint_crop import InpaintCrop, crop_for_inpainting
from sdmodule.conditioning.inpaint_latents import InpaintLatents, prepare_inpaint_latents
from sdmodule.conditioning.text import count_chunks, encode_prompts
from sdmodule.diffusion.sampler import denoise, draw_latents, seed_generators
from sdmodule.errors import SettingsError
from sdmodule.sampling.decode import decode
from sdmodule.sampling.guided_denoiser import GuidedDenoiser
from sdmodule.sampling.requests import SampleRequest
from sdmodule.sampling.result import Samples
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.stopwatch import Stopwatch
from sdmodule.speed.attention import check_attention
from sdmodule.speed.deep_cache import always_whole, caching, check_cache
from sdmodule.speed.steps import plan_steps
from sdmodule.speed.text_kv_cache import text_kv_cache
from sdmodule.tome.apply import apply_merging

if TYPE_CHECKING:
    from sdmodule.components.checkpoint import Components

LARGEST_SIDE = 65536
"""Pixels of an image's side; attention over one of such a size would need petabytes."""

ZERO_SNR_RESCALE = 0.7
"""Guidance rescale for models of zero terminal SNR (Lin et al. 2023, section 3.4)."""


def latent_shape(parts: Components, settings: SamplingSettings) -> tuple[int, int, int]:
    """Shape ``(C, h, w)`` of one image's latents.

    Raises:
        SettingsError: for a height or width that the autoencoder's factor does not divide.
    """
    factor = parts.pixels_per_latent
    sides = []
    for name, pixels in (("height", settings.height), ("width", settings.width)):
        pixels = parts.unet.config.sample_size * factor if pixels is None else pixels
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < factor or pixels % factor:
            below = max(pixels // factor, 1) * factor if isinstance(pixels, int) else factor
            raise SettingsError(
                f"{name}={pixels} is not allowed; give a multiple of {factor} such as {below} or {below + factor}."
            )
        if pixels > LARGEST_SIDE:
            raise SettingsError(f"{name}={pixels} is more than any device can hold; give at most {LARGEST_SIDE}.")
        sides.append(pixels // factor)
    return parts.vae.config.latent_channels, sides[0], sides[1]


def sampling_scheduler(parts: Components, settings: SamplingSettings) -> Any:
    """The scheduler with its timesteps set.

    Raises:
        SettingsError: for an unknown scheduler, or more steps than it was trained with.
    """
    scheduler = make_scheduler(settings.scheduler, parts.scheduler.config)
    total = scheduler.config.num_train_timesteps
    if settings.steps > total:
        raise SettingsError(f"steps={settings.steps} is more than the schedule's {total} timesteps; give 1 to {total}.")
    scheduler.set_timesteps(settings.steps)
    beyond = int(max(scheduler.timesteps)) - (total - 1)
    if beyond > 0:  # by its steps_offset
        raise SettingsError(
            f"steps={settings.steps} reaches {beyond} beyond the schedule's {total} timesteps; "
            f"give 1 to {total - beyond}."
        )
    skipped = skipped_timesteps(scheduler, settings)
    if skipped >= len(scheduler.timesteps):
        raise SettingsError(
            f"strength={settings.inpaint.strength} of steps={settings.steps} leaves no step to take; "
            f"give a strength of at least {math.ceil(1000 / settings.steps) / 1000}, or more steps."
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler


def skipped_timesteps(scheduler: Any, settings: SamplingSettings) -> int:
    """Timesteps at the noisy end that a strength below 1 leaves out."""
    return (settings.steps - settings.steps_taken) * getattr(scheduler, "order", 1)


def check_settings(parts: Components, settings: SamplingSettings) -> None:
    """Check what only the checkpoint can tell, long before the first image: its sizes, its schedule.

    Raises:
        SettingsError: for a size, a scheduler or a number of steps that it does not take.
    """
    _, *sides = latent_shape(parts, settings)
    settings.merging.check(parts.unet, (sides[0], sides[1]))
    check_attention(settings.speed.attention)
    if settings.speed.cache_every > 1:
        check_cache(parts.unet, settings.speed.cache_layers)
    sampling_scheduler(parts, settings)


def chunks_needed(parts: Components, request: SampleRequest) -> int:
    """Chunks of text that a request's prompt and negative prompt need; the two are encoded at one length."""
    return max(count_chunks(text, parts.tokenizer) for text in (request.prompt, request.negative_prompt))


def encode_requests(parts: Components, requests: Sequence[SampleRequest], guided: bool) -> Tensor:
    """Embeddings of a batch, the negative prompts' half first if guided: ``[B or 2B, chunks * 77, D]``.

    A text that occurs several times is encoded once.
    """
    texts = [r.negative_prompt for r in requests] if guided else []
    texts += [r.prompt for r in requests]
    unique = list(dict.fromkeys(texts))
    chunks = max(chunks_needed(parts, request) for request in requests)
    embeddings = encode_prompts(unique, parts.tokenizer, parts.text_encoder, chunks=chunks)
    return embeddings[[unique.index(text) for text in texts]]


@torch.no_grad()
def sample(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    *,
    noise: Tensor | None = None,
    sources: Sequence[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Samples:
    """Sample one batch of images, all of the same size and length of text.

    Args:
        parts: the model.
        requests: B images; each is drawn from its own seed.
        settings: steps, guidance and the rest.
        noise: initial noise ``[B, 4, h, w]``, instead of the seeds'.
        sources: one generator an image, instead of the seeds'.
        on_step: called with the number of steps done and the latents.
    """
    watch = Stopwatch(parts.unet.device)
    scheduler = sampling_scheduler(parts, settings)
    shape = latent_shape(parts, settings)
    crops = lay_out_all(parts, requests, settings)
    metadata = describe(parts, settings, bool(crops))
    scale, correction = metadata["guidance_scale"], metadata["guidance_rescale"]
    guided = scale > 1.0
    controls = [request.control for request in requests if request.control is not None]
    control = prepare_control(parts, controls, shape[1:], settings.control_scale)

    with watch.stage("text"):
        embeddings = encode_requests(parts, requests, guided).to(parts.unet.dtype)

    sources = seed_generators([r.seed for r in requests]) if sources is None else sources
    whole, skipped = settings.inpaint.strength >= 1.0, skipped_timesteps(scheduler, settings)
    repainting: InpaintLatents | None = None
    if crops:
        with watch.stage("encode"):
            repainting = prepare_inpaint_latents(parts, crops, noise, shape, sources, whole)

    steps = plan_steps(scheduler.timesteps[skipped:], scheduler.config.num_train_timesteps, settings.speed, guided)
    merging, draws = settings.merging.for_images([r.seed for r in requests], all(step.guided for step in steps))
    merged = apply_merging(parts.unet, merging, draws, shape[1:], len(steps))
    every, layers = settings.speed.cache_every, settings.speed.cache_layers
    cached = caching(parts.unet, layers) if every > 1 else nullcontext(always_whole)
    seen = (lambda latents: latents) if repainting is None else repainting.seen

    def stepped(done: int, latents: Tensor) -> None:
        watch.mark()
        if on_step is not None:
            on_step(done, latents)

    with watch.stage("denoise"), merged as merge, cached as cache, text_kv_cache(parts.unet, embeddings):
        predict = GuidedDenoiser(parts.unet, embeddings, steps, scale, correction, seen, merge, cache, control)
        if repainting is None:
            noise = draw_latents(shape, sources, like=embeddings) if noise is None else noise.to(embeddings)
            start, keep = noise * scheduler.init_noise_sigma, None
        else:
            start = repainting.start(scheduler, scheduler.timesteps[skipped:], whole)
            keep = partial(repainting.keep, scheduler=scheduler)
        watch.mark()
        latents = denoise(predict, start, scheduler, sources, settings.eta, skipped=skipped, keep=keep, on_step=stepped)

    with watch.stage("decode"):
        images = decode(parts, latents).cpu()
    places = [(row, len(requests)) for row in range(len(requests))]
    return Samples(images, list(requests), watch.seconds, metadata, crops, places, watch.steps())


def describe(parts: Components, settings: SamplingSettings, inpainting: bool) -> dict[str, Any]:
    """The settings of an image in plain types: what ``from=`` needs to make it again."""
    scheduler, changed = resolve(settings.scheduler, parts.scheduler.config)
    _, *sides = latent_shape(parts, settings)
    correction = settings.guidance_rescale
    if correction is None:
        zero_snr = make_scheduler(settings.scheduler, parts.scheduler.config).config.get("rescale_betas_zero_snr")
        correction = ZERO_SNR_RESCALE if zero_snr else 0.0
    metadata = {
        "steps": settings.steps,
        "guidance_scale": parts.guidance_scale if settings.guidance_scale is None else settings.guidance_scale,
        "guidance_rescale": correction,
        "eta": settings.eta,
        "scheduler": scheduler,
        "scheduler_settings": changed,
        "height": sides[0] * parts.pixels_per_latent,
        "width": sides[1] * parts.pixels_per_latent,
        "model": parts.source,
    }
    if settings.merging.ratio:
        metadata["tome"] = asdict(settings.merging)
    if parts.controlnet is not None:
        metadata["control_scale"] = settings.control_scale
    if speed := settings.speed.metadata():
        metadata["speed"] = speed
    if inpainting:
        metadata |= {"inpaint": way_to_inpaint(parts), **asdict(settings.inpaint)}
    return metadata


def way_to_inpaint(parts: Components) -> str:
    """How this checkpoint repaints: its UNet is told of the mask, or the known region is put back at every step."""
    return "9 channels" if is_inpaint_unet(parts.unet) else "known region re-noised at every step"


def lay_out_all(parts: Components, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[InpaintCrop]:
    """What the model works on of each masked image; nothing for images from text alone."""
    _, *sides = latent_shape(parts, settings)
    height, width = (side * parts.pixels_per_latent for side in sides)
    return [crop_for_inpainting(r.masked, height, width, settings.inpaint) for r in requests if r.masked is not None]


def sample_all(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Samples:
    """Sample images whose prompts may need different lengths of text, and return them in the order asked for.

    Prompts of one length share a batch: padding a short prompt to its neighbour's length would change its image.

    Args:
        parts: the model.
        requests: what to sample.
        settings: steps, guidance and the rest.
        noise: initial noise ``[B, 4, h, w]``, instead of the seeds'.
        generator: source of all noise, or one an image, instead of the seeds'.
        on_step: called with the number of steps done and the latents.

    Raises:
        SettingsError: for noise of another shape or another number of generators.
    """
    shape = (len(requests), *latent_shape(parts, settings))
    sources = [generator] * len(requests) if isinstance(generator, torch.Generator) else generator
    if noise is not None and tuple(noise.shape) != shape:
        raise SettingsError(f"latents have the shape {tuple(noise.shape)}; give {shape}.")
    if sources is not None and len(sources) != len(requests):
        raise SettingsError(f"{len(sources)} generators were given for {len(requests)} images; give one for each.")
    groups: dict[int, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(chunks_needed(parts, request), []).append(position)
    done = []
    for positions in groups.values():
        samples = sample(
            parts,
            [requests[p] for p in positions],
            settings,
            noise=None if noise is None else noise[positions],
            sources=None if sources is None else [sources[p] for p in positions],
            on_step=on_step,
        )
        done.append(samples)
    if len(done) == 1:
        return done[0]
    order = torch.tensor([p for positions in groups.values() for p in positions]).argsort()
    seconds: dict[str, float] = {}
    for stage in done[0].seconds:
        seconds[stage] = sum(samples.seconds[stage] for samples in done)
    crops = [canvas for samples in done for canvas in samples.crops]
    places = [place for samples in done for place in samples.places]
    return Samples(
        torch.cat([s.decoded for s in done])[order],
        list(requests),
        seconds,
        done[0].metadata,
        [crops[k] for k in order] if crops else [],
        [places[k] for k in order],
        [step for samples in done for step in samples.step_seconds],
    )
