"""What a batch is conditioned on, as one value: text, control, mask, noise, guided steps, token merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.precision import latents_dtype
from sdmodule.conditioning.control import ControlStack, prepare_control
from sdmodule.conditioning.image_latents import image_latents
from sdmodule.conditioning.inpaint_crop import InpaintCrop, crop_for_inpainting
from sdmodule.conditioning.inpaint_latents import InpaintLatents, prepare_inpaint_latents
from sdmodule.diffusion.guidance import embed_guidance_scale
from sdmodule.diffusion.noise_level import NoiseLevel
from sdmodule.diffusion.sampler import Generators, draw_latents, seed_generators
from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError
from sdmodule.families.conditioning import Conditioning
from sdmodule.sampling.metadata import guidance
from sdmodule.sampling.requests import SampleRequest
from sdmodule.sampling.schedule import Schedule, image_size, latent_shape, sampling_schedule
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.stopwatch import Stopwatch
from sdmodule.sampling.text_conditions import GivenText, text_conditions
from sdmodule.speed.steps import StepPlan, plan_steps
from sdmodule.tome.token_merging import TokenMerging


@dataclass
class BatchConditions:
    """Everything that the denoising of B images depends on.

    Attributes:
        text: embeddings of the prompts, behind those of the negative prompts if guided, B or 2B of them.
        guidance_embedding: of the guidance scale, ``[B, D]``, for a UNet distilled from guided samples; else None.
        latents: where the denoising starts, ``[B, 4, h, w]``.
        generators: one per image, or one for all, for schedulers that add noise.
        schedule: the scheduler and its timesteps.
        steps: what each step does.
        guidance_scale: strength of guidance.
        guidance_rescale: share of the correction for overexposure.
        merging: token merging.
        merge_seeds: seeds of its draws.
        control: the ControlNet with its control images.
        inpaint: masks and known latents.
        noise_levels: that each step starts from, if the known region is restored.
        crops: the part of each masked image that is inpainted.
    """

    text: Conditioning
    guidance_embedding: Tensor | None
    latents: Tensor
    generators: Generators
    schedule: Schedule
    steps: list[StepPlan]
    guidance_scale: float
    guidance_rescale: float
    merging: TokenMerging
    merge_seeds: Sequence[int]
    control: ControlStack | None
    inpaint: InpaintLatents | None
    noise_levels: Sequence[NoiseLevel]
    crops: list[InpaintCrop]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]

    def denoiser_input(self, latents: Tensor) -> Tensor:
        """What the denoiser is given: the latents, with the mask's channels if it takes them."""
        return latents if self.inpaint is None else self.inpaint.denoiser_input(latents)

    def restore_known_region(self, latents: Tensor, done: int) -> Tensor:
        """Latents with the unmasked area put back, as noisy as they are after ``done`` steps; see `InpaintLatents`."""
        assert self.inpaint is not None
        level = self.noise_levels[done] if done < len(self.noise_levels) else None
        return self.inpaint.restore_known_region(latents, level)


@dataclass(frozen=True)
class Given:
    """What is given instead of being drawn or encoded, for a batch of B images.

    Attributes:
        noise: initial noise ``[B, 4, h, w]``, instead of the seeds'.
        generators: one per image, or one for all, instead of the seeds'.
        latents: to start from instead of the requests' images, ``[B, 4, h, w]``.
        text: embeddings, instead of the requests' prompts.
    """

    noise: Tensor | None = None
    generators: Generators | None = None
    latents: Tensor | None = None
    text: GivenText | None = None


NOTHING_GIVEN = Given()


def prepare_conditions(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    watch: Stopwatch,
    given: Given,
) -> BatchConditions:
    """Everything that a batch is conditioned on.

    Args:
        parts: the model.
        requests: B images, all of the same size and length of text.
        settings: steps, guidance and the rest.
        watch: times the stages ``text`` and ``encode``.
        given: what is given instead of being drawn or encoded.

    Raises:
        SettingsError: for control images without a ControlNet, the reverse, or a mask that vanishes.
    """
    schedule = sampling_schedule(parts, settings)
    scheduler, timesteps = schedule.scheduler, schedule.timesteps
    shape = latent_shape(parts, settings)
    seeds = [request.seed for request in requests]
    scale, rescale = guidance(parts, settings)
    embedded = parts.unet.config.time_cond_proj_dim  # a distilled UNet is told its guidance scale instead
    guided = scale > 1.0 and embedded is None
    steps = plan_steps(timesteps, scheduler.config.num_train_timesteps, settings.speed, guided)
    if hasattr(scheduler, "noise_sampler_seed"):  # DPM++ SDE draws from a Brownian tree of its own
        scheduler.noise_sampler_seed = seeds
    merging, merge_seeds = settings.merging.for_images(seeds, all(step.guided for step in steps))
    controls = [request.control for request in requests if request.control is not None]
    control = prepare_control(parts, controls, shape[1:], settings.control, len(steps))
    with watch.stage("text"):
        text = text_conditions(parts, requests, settings, guided, given.text)

    generators = seed_generators(seeds) if given.generators is None else given.generators
    given = replace(given, generators=generators)
    crops = crop_all(parts, requests, settings)
    latents, inpaint = start_latents(parts, requests, settings, schedule, crops, given, watch)
    guidance_embedding = None
    if embedded is not None:
        unet = parts.unet
        guidance_embedding = embed_guidance_scale(scale, embedded).to(unet.device, unet.dtype).expand(len(seeds), -1)
    restores = inpaint is not None and inpaint.restores
    levels = [schedule.noise_level(step, latents.dtype) for step in range(len(steps))] if restores else []
    return BatchConditions(
        text=text,
        guidance_embedding=guidance_embedding,
        latents=latents,
        generators=generators,
        schedule=schedule,
        steps=steps,
        guidance_scale=scale,
        guidance_rescale=rescale,
        merging=merging,
        merge_seeds=merge_seeds,
        control=control,
        inpaint=inpaint,
        noise_levels=levels,
        crops=crops,
    )


def start_latents(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    schedule: Schedule,
    crops: list[InpaintCrop],
    given: Given,
    watch: Stopwatch,
) -> tuple[Tensor, InpaintLatents | None]:
    """Where the denoising starts, ``[B, 4, h, w]``, and the masks of images to inpaint.

    That is pure noise; or an image, its latents or those of an earlier stage, with as much noise as the first timestep
    has. Noisy latents of an earlier stage are taken as they are.
    """
    shape, scheduler = latent_shape(parts, settings), schedule.scheduler
    like = torch.empty(0, device=parts.unet.device, dtype=latents_dtype(parts.unet))
    level = schedule.noise_level(0, like.dtype)
    images = [request.image for request in requests if request.image is not None]
    generators = given.generators
    assert generators is not None
    if given.latents is None and crops:
        from_noise = settings.inpaint.strength >= 1.0
        with watch.stage("encode"):
            inpaint = prepare_inpaint_latents(parts, crops, given.noise, shape, generators, from_noise)
        return inpaint.start(scheduler, level, from_noise), inpaint

    known = given.latents
    if known is None and images:
        with watch.stage("encode"):
            known = image_latents(parts, images, image_size(parts, settings), generators)
    if known is not None and tuple(known.shape[1:]) != shape:
        raise SettingsError(f"image: latents have shape {tuple(known.shape[1:])}; give {shape}.")
    if known is not None and settings.denoising_start is not None:
        return known, None
    noise = given.noise
    noise = (
        draw_latents((len(requests), *shape), generators, like)
        if noise is None
        else upload(noise, like.device).to(like)
    )
    if known is None:
        return noise * scheduler.init_noise_sigma, None
    return level.noised(known, noise), None


def crop_all(parts: Components, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[InpaintCrop]:
    """The part of each masked image that is inpainted; nothing for text-to-image."""
    height, width = image_size(parts, settings)
    masked = [request.masked for request in requests if request.masked is not None]
    return [crop_for_inpainting(one, height, width, settings.inpaint) for one in masked]
