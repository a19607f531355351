"""What a batch is conditioned on, as one value: text, control, mask, noise, guided steps, token merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.control import ControlGuide, prepare_control
from sdmodule.conditioning.inpaint_crop import InpaintCrop, crop_for_inpainting
from sdmodule.conditioning.inpaint_latents import InpaintLatents, prepare_inpaint_latents
from sdmodule.conditioning.text import chunks_of, encode_texts
from sdmodule.diffusion.guidance import embed_guidance_scale
from sdmodule.diffusion.sampler import Generators, draw_latents, seed_generators
from sdmodule.families.conditioning import Conditioning, ImageSizes
from sdmodule.sampling.metadata import guidance
from sdmodule.sampling.requests import SampleRequest
from sdmodule.sampling.schedule import image_size, latent_shape, sampling_scheduler, skipped_timesteps
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.stopwatch import Stopwatch
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
        scheduler: with its timesteps set.
        skipped: timesteps at the noisy end that are skipped.
        steps: what each step does.
        guidance_scale: strength of guidance.
        guidance_rescale: share of the correction for overexposure.
        merging: token merging.
        merge_seeds: seeds of its draws.
        control: the ControlNet with its control images.
        inpaint: masks and known latents.
        crops: the part of each masked image that is inpainted.
    """

    text: Conditioning
    guidance_embedding: Tensor | None
    latents: Tensor
    generators: Generators
    scheduler: Any
    skipped: int
    steps: list[StepPlan]
    guidance_scale: float
    guidance_rescale: float
    merging: TokenMerging
    merge_seeds: Sequence[int]
    control: ControlGuide | None
    inpaint: InpaintLatents | None
    crops: list[InpaintCrop]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]

    def denoiser_input(self, latents: Tensor) -> Tensor:
        """What the denoiser is given: the latents, with the mask's channels if it takes them."""
        return latents if self.inpaint is None else self.inpaint.denoiser_input(latents)

    def restore_known_region(self, latents: Tensor, upcoming: Tensor | None) -> Tensor:
        """Latents with the unmasked area put back, as noisy as the ``upcoming`` timestep; see `InpaintLatents`."""
        return latents if self.inpaint is None else self.inpaint.restore_known_region(latents, upcoming, self.scheduler)


def prepare_conditions(
    parts: Components,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    watch: Stopwatch,
    noise: Tensor | None = None,
    generators: Generators | None = None,
) -> BatchConditions:
    """Everything that a batch is conditioned on.

    Args:
        parts: the model.
        requests: B images, all of the same length of text.
        settings: steps, guidance and the rest.
        watch: times the stages ``text`` and ``encode``.
        noise: initial noise ``[B, 4, h, w]``, instead of the seeds'.
        generators: one per image, or one for all, instead of the seeds'.

    Raises:
        SettingsError: for control images without a ControlNet, the reverse, or a mask that vanishes.
    """
    scheduler = sampling_scheduler(parts, settings)
    skipped = skipped_timesteps(scheduler, settings)
    timesteps = scheduler.timesteps[skipped:]
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
    control = prepare_control(parts, controls, shape[1:], settings.control_scale)
    with watch.stage("text"):
        text = encode_requests(parts, requests, guided).to(parts.unet.dtype)
        size = image_size(parts, settings)
        text = parts.family.with_sizes(text, [ImageSizes(size, (0, 0), size)] * len(text))

    generators = seed_generators(seeds) if generators is None else generators
    crops = crop_all(parts, requests, settings)
    inpaint: InpaintLatents | None = None
    if crops:
        from_noise = settings.inpaint.strength >= 1.0
        with watch.stage("encode"):
            inpaint = prepare_inpaint_latents(parts, crops, noise, shape, generators, from_noise)
        latents = inpaint.start(scheduler, timesteps, from_noise)
    else:
        like = text.hidden_states
        noise = draw_latents((len(requests), *shape), generators, like) if noise is None else noise.to(like)
        latents = noise * scheduler.init_noise_sigma
    guidance_embedding = None
    if embedded is not None:
        guidance_embedding = embed_guidance_scale(scale, embedded).to(text.hidden_states).expand(len(requests), -1)
    return BatchConditions(
        text=text,
        guidance_embedding=guidance_embedding,
        latents=latents,
        generators=generators,
        scheduler=scheduler,
        skipped=skipped,
        steps=steps,
        guidance_scale=scale,
        guidance_rescale=rescale,
        merging=merging,
        merge_seeds=merge_seeds,
        control=control,
        inpaint=inpaint,
        crops=crops,
    )


def chunks_needed(parts: Components, request: SampleRequest) -> int:
    """Chunks of text that a request's prompt and negative prompt need; both are encoded at one length."""
    return chunks_of((request.prompt, request.negative_prompt), parts)


def encode_requests(parts: Components, requests: Sequence[SampleRequest], guided: bool) -> Conditioning:
    """Text embeddings of a batch, the negative prompts first if guided: B or 2B of them.

    Prompts and negative prompts are encoded apart, as in diffusers, whose rounding this keeps. A text that occurs
    several times is encoded once.
    """
    chunks = max(chunks_needed(parts, request) for request in requests)

    def encode(texts: list[str]) -> Conditioning:
        unique = list(dict.fromkeys(texts))
        return encode_texts(unique, parts, chunks)[[unique.index(text) for text in texts]]

    prompts = encode([request.prompt for request in requests])
    if not guided:
        return prompts
    texts = [request.negative_prompt for request in requests]
    negatives = encode(texts)
    if parts.zero_empty_prompts:
        negatives = negatives.zeroed([row for row, text in enumerate(texts) if not text])
    return negatives.followed_by(prompts)


def crop_all(parts: Components, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[InpaintCrop]:
    """The part of each masked image that is inpainted; nothing for text-to-image."""
    height, width = image_size(parts, settings)
    masked = [request.masked for request in requests if request.masked is not None]
    return [crop_for_inpainting(one, height, width, settings.inpaint) for one in masked]
