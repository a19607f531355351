"""Sizes and timesteps of a batch, and what only the checkpoint can say about them."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.inpaint_unet import is_inpaint_unet
from sdmodule.components.schedulers import make_scheduler
from sdmodule.diffusion.noise_level import NoiseLevel
from sdmodule.errors import SettingsError, is_int
from sdmodule.sampling.requests import IMAGE2IMAGE, INPAINT
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.attention import check_attention
from sdmodule.speed.deep_cache import check_cache
from sdmodule.speed.offload import check_offload
from sdmodule.speed.quantize import check_quantize

LARGEST_SIDE = 65536
"""Pixels of an image's side; attention over a larger one would need petabytes."""


def latent_shape(parts: Components, settings: SamplingSettings) -> tuple[int, int, int]:
    """Shape ``(C, h, w)`` of one image's latents.

    Raises:
        SettingsError: for a height or width that is not a multiple of the VAE's factor.
    """
    factor = parts.pixels_per_latent
    sides = []
    for name, pixels in (("height", settings.height), ("width", settings.width)):
        pixels = parts.unet.config.sample_size * factor if pixels is None else pixels
        if not is_int(pixels) or pixels < factor or pixels % factor:
            below = max(pixels // factor, 1) * factor if is_int(pixels) else factor
            raise SettingsError(
                f"{name}={pixels}: must be a multiple of {factor}, such as {below} or {below + factor}."
            )
        if pixels > LARGEST_SIDE:
            raise SettingsError(f"{name}={pixels}: is too large for any device; give at most {LARGEST_SIDE}.")
        sides.append(pixels // factor)
    return parts.vae.config.latent_channels, sides[0], sides[1]


def image_size(parts: Components, settings: SamplingSettings) -> tuple[int, int]:
    """Height and width of the sampled images in pixels."""
    _, height, width = latent_shape(parts, settings)
    return height * parts.pixels_per_latent, width * parts.pixels_per_latent


def sized_like(parts: Components, settings: SamplingSettings, image: Image.Image | Tensor | None) -> SamplingSettings:
    """Settings with the size for an image to start from: its own aspect ratio, and the checkpoint's number of pixels.

    A height or width that is given stays, and so do the sizes of latents.
    """
    if image is None or None not in (settings.height, settings.width):
        return settings
    factor = parts.pixels_per_latent
    if isinstance(image, Tensor):
        height, width = (side * factor for side in image.shape[-2:])
        return replace(settings, height=settings.height or height, width=settings.width or width)
    if settings.height is not None:
        scale = settings.height / image.height
    elif settings.width is not None:
        scale = settings.width / image.width
    else:
        scale = math.sqrt(parts.resolution**2 / (image.width * image.height))
    sides: Any = {
        name: max(round(side * scale / factor), 1) * factor
        for name, side in (("height", image.height), ("width", image.width))
        if getattr(settings, name) is None
    }
    return replace(settings, **sides)


@dataclass(frozen=True)
class Schedule:
    """A scheduler and the timesteps that a batch is denoised at.

    Attributes:
        scheduler: a scheduler of diffusers, begun at the first of them.
        timesteps: from noise to image.
        first: index of the first of them among the scheduler's.
    """

    scheduler: Any
    timesteps: Tensor
    first: int = 0

    def noise_level(self, step: int, dtype: torch.dtype) -> NoiseLevel:
        """The noise level that a step starts from; to be asked for before the first step."""
        return NoiseLevel.of(self.scheduler, self.timesteps[step : step + 1], self.first + step, dtype)


def sampling_schedule(parts: Components, settings: SamplingSettings) -> Schedule:
    """The scheduler and the timesteps that are left of its own by strength, ``denoising_start`` and ``denoising_end``.

    Raises:
        SettingsError: for an unknown scheduler, more steps than it was trained with, timesteps or sigmas that it does
            not take, or if no step is left.
    """
    scheduler = make_scheduler(settings.scheduler, parts.scheduler.config)
    if settings.eta and "eta" not in inspect.signature(scheduler.step).parameters:
        name = type(scheduler).__name__
        raise SettingsError(f"eta={settings.eta}: has no effect with {name}; use the scheduler ddim, or leave it out.")
    _set_timesteps(scheduler, settings)
    first = _first_step(scheduler, settings)
    timesteps = scheduler.timesteps[first:]
    if settings.denoising_end is not None:
        total = scheduler.config.num_train_timesteps
        timesteps = timesteps[: int((timesteps >= round(total - settings.denoising_end * total)).sum())]
    if not len(timesteps):
        raise _no_step_left(settings)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return Schedule(scheduler, timesteps, first)


def _set_timesteps(scheduler: Any, settings: SamplingSettings) -> None:
    total = scheduler.config.num_train_timesteps
    for name in ("timesteps", "sigmas"):
        values = getattr(settings, name)
        if values is None:
            continue
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise SettingsError(f"{name}: {type(scheduler).__name__} does not take them; use the scheduler euler.")
        try:
            scheduler.set_timesteps(**{name: list(values)})
        except ValueError as error:
            raise SettingsError(f"{name}={list(values)}: {type(scheduler).__name__} says: {error}") from error
        return
    if settings.steps > total:
        raise SettingsError(f"steps={settings.steps}: the schedule has {total} timesteps; give 1 to {total}.")
    scheduler.set_timesteps(settings.steps)
    beyond = int(max(scheduler.timesteps)) - (total - 1)
    if beyond > 0:  # because of its steps_offset
        raise SettingsError(
            f"steps={settings.steps}: reaches {beyond} beyond the schedule's {total} timesteps; "
            f"give 1 to {total - beyond}."
        )


def _first_step(scheduler: Any, settings: SamplingSettings) -> int:
    """Index of the first timestep that is not skipped."""
    order = getattr(scheduler, "order", 1)
    if settings.denoising_start is None:
        return (settings.steps_asked - settings.steps_taken) * order
    total = scheduler.config.num_train_timesteps
    left = int((scheduler.timesteps < round(total - settings.denoising_start * total)).sum())
    if order == 2 and left % 2 == 0:  # a step of second order that began must end
        left += 1
    return len(scheduler.timesteps) - left


def _no_step_left(settings: SamplingSettings) -> SettingsError:
    steps = settings.steps_asked
    if settings.denoising_start is None and settings.denoising_end is None:
        least = math.ceil(1000 / steps) / 1000
        return SettingsError(
            f"strength={settings.inpaint.strength}: leaves no step of steps={steps}; give a strength of at least "
            f"{least}, or more steps."
        )
    named = [f"{name}={getattr(settings, name)}" for name in ("denoising_start", "denoising_end")]
    given = ", ".join(name for name in named if not name.endswith("None"))
    return SettingsError(f"{given}: leaves no step of steps={steps}; give more steps.")


def _check_family(parts: Components, settings: SamplingSettings) -> None:
    """Check what only some families take."""
    family = parts.family
    if settings.sizes.given and not family.takes_sizes:
        raise SettingsError(
            f"{', '.join(settings.sizes.given)}: no effect with {family.title}, which is told no sizes; leave it out."
        )
    layers = min(encoder.config.num_hidden_layers for _, encoder in parts.text_encoders)
    if settings.clip_skip >= layers:
        raise SettingsError(
            f"clip_skip={settings.clip_skip}: the text encoder has {layers} layers; give 0 to {layers - 1}."
        )


def warn_of_size(parts: Components, settings: SamplingSettings) -> None:
    """Say that a size is not one of those that the family was trained on, if it was trained on certain ones."""
    height, width = size = image_size(parts, settings)
    if size in parts.family.trained_sizes or parts.resolution not in {h for h, _ in parts.family.trained_sizes}:
        return
    nearest = min(parts.family.trained_sizes, key=lambda one: (abs(math.log(one[0] * width / (one[1] * height))), one))
    rank_zero_warn(
        f"height={height}, width={width}: {parts.family.title} was trained on other sizes, so images may lack "
        f"composition or detail; the nearest in shape is height={nearest[0]} width={nearest[1]}."
    )


def check_settings(parts: Components, settings: SamplingSettings, task: str) -> None:
    """Check what only the checkpoint can say, long before the first image: sizes and schedule.

    Raises:
        SettingsError: for a size, a scheduler, a number of steps or a task that cannot be used with it.
    """
    if is_inpaint_unet(parts.unet) and task != INPAINT:
        raise SettingsError(f"pretrained={parts.source}: its UNet takes a mask; use model=inpaint.")
    _check_family(parts, settings)
    if settings.denoising_start is not None and task != IMAGE2IMAGE:
        raise SettingsError(
            f"denoising_start={settings.denoising_start}: needs the latents that it goes on from; use "
            "model=image2image and give them as image."
        )
    _, *sides = latent_shape(parts, settings)
    settings.merging.check(parts.unet, (sides[0], sides[1]))
    check_attention(settings.speed.attention)
    check_offload(settings.speed.offload)
    check_quantize(settings.speed.quantize)
    if parts.image_prompts is not None and settings.speed.attention != "sdpa":
        raise SettingsError(f"speed.attention={settings.speed.attention}: an IP-Adapter has its own; leave it out.")
    if settings.speed.cache_every > 1:
        if parts.image_prompts is not None:
            raise SettingsError("speed.cache_every: does not work with an IP-Adapter; set speed.cache_every=1.")
        check_cache(parts.unet, settings.speed.cache_layers)
        if settings.freeu is not None:
            raise SettingsError("freeu: works on layers that speed.cache_every leaves out; give one of them.")
    sampling_schedule(parts, settings)
    warn_of_size(parts, settings)
