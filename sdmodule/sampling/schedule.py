"""Sizes and timesteps of a batch, and what only the checkpoint can say about them."""

from __future__ import annotations

import inspect
import math
from typing import Any

from sdmodule.components.checkpoint import Components
from sdmodule.components.inpaint_unet import is_inpaint_unet
from sdmodule.components.schedulers import make_scheduler
from sdmodule.errors import SettingsError, is_int
from sdmodule.sampling.requests import INPAINT
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.attention import check_attention
from sdmodule.speed.deep_cache import check_cache

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


def sampling_scheduler(parts: Components, settings: SamplingSettings) -> Any:
    """The scheduler with its timesteps set, and begun where the inpainting strength says.

    Raises:
        SettingsError: for an unknown scheduler, or more steps than it was trained with.
    """
    scheduler = make_scheduler(settings.scheduler, parts.scheduler.config)
    total = scheduler.config.num_train_timesteps
    if settings.steps > total:
        raise SettingsError(f"steps={settings.steps}: the schedule has {total} timesteps; give 1 to {total}.")
    if settings.eta and "eta" not in inspect.signature(scheduler.step).parameters:
        name = type(scheduler).__name__
        raise SettingsError(f"eta={settings.eta}: has no effect with {name}; use the scheduler ddim, or leave it out.")
    scheduler.set_timesteps(settings.steps)
    beyond = int(max(scheduler.timesteps)) - (total - 1)
    if beyond > 0:  # because of its steps_offset
        raise SettingsError(
            f"steps={settings.steps}: reaches {beyond} beyond the schedule's {total} timesteps; "
            f"give 1 to {total - beyond}."
        )
    skipped = skipped_timesteps(scheduler, settings)
    if skipped >= len(scheduler.timesteps):
        raise SettingsError(
            f"strength={settings.inpaint.strength}: leaves no step of steps={settings.steps}; "
            f"give a strength of at least {math.ceil(1000 / settings.steps) / 1000}, or more steps."
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return scheduler


def skipped_timesteps(scheduler: Any, settings: SamplingSettings) -> int:
    """Timesteps at the noisy end that a strength below 1 skips."""
    return (settings.steps - settings.steps_taken) * getattr(scheduler, "order", 1)


def check_settings(parts: Components, settings: SamplingSettings, task: str) -> None:
    """Check what only the checkpoint can say, long before the first image: sizes and schedule.

    Raises:
        SettingsError: for a size, a scheduler, a number of steps or a task that cannot be used with it.
    """
    if is_inpaint_unet(parts.unet) and task != INPAINT:
        raise SettingsError(f"pretrained={parts.source}: its UNet takes a mask; use model=inpaint.")
    _, *sides = latent_shape(parts, settings)
    settings.merging.check(parts.unet, (sides[0], sides[1]))
    check_attention(settings.speed.attention)
    if settings.speed.cache_every > 1:
        check_cache(parts.unet, settings.speed.cache_layers)
    sampling_scheduler(parts, settings)
