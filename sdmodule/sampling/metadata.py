"""How an image was made, in plain types: what ``from=`` needs to make it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sdmodule.components.checkpoint import Components
from sdmodule.components.inpaint_unet import is_inpaint_unet
from sdmodule.components.schedulers import make_scheduler, resolve_scheduler
from sdmodule.sampling.schedule import image_size
from sdmodule.sampling.settings import SamplingSettings

ZERO_SNR_RESCALE = 0.7
"""Guidance rescale for models of zero terminal SNR (Lin et al. 2023, section 3.4)."""


def guidance(parts: Components, settings: SamplingSettings) -> tuple[float, float]:
    """Guidance scale and guidance rescale: those of the settings, or else the checkpoint's."""
    scale = parts.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    if settings.guidance_rescale is not None:
        return scale, settings.guidance_rescale
    config = make_scheduler(settings.scheduler, parts.scheduler.config).config
    return scale, ZERO_SNR_RESCALE if config.get("rescale_betas_zero_snr") else 0.0


def describe(parts: Components, settings: SamplingSettings, task: str) -> dict[str, Any]:
    """The metadata that the images of a run share; those of image-to-image may have sizes of their own."""
    scheduler, changed = resolve_scheduler(settings.scheduler, parts.scheduler.config)
    scale, rescale = guidance(parts, settings)
    height, width = image_size(parts, settings)
    if task == "image2image":
        height, width = settings.height, settings.width  # type: ignore[assignment]
    metadata: dict[str, Any] = {
        "steps": settings.steps,
        "guidance_scale": scale,
        "guidance_rescale": rescale,
        "eta": settings.eta,
        "scheduler": scheduler,
        "scheduler_settings": changed,
        "height": height,
        "width": width,
        "model": parts.source,
        "family": parts.family.title,
    }
    if settings.merging.ratio:
        metadata["tome"] = asdict(settings.merging.for_unet(parts.unet))
    if parts.controlnet is not None:
        metadata |= settings.control.metadata()
    if parts.refiner is not None:
        metadata["refiner_start"] = settings.refiner_start
    if parts.image_prompts is not None:
        metadata["ip_adapter_scale"] = settings.ip_adapter_scale
    metadata |= settings.unusual()
    if speed := settings.speed.metadata():
        metadata["speed"] = speed
    if task == "inpaint":
        metadata |= {"inpaint": inpainting_method(parts), **asdict(settings.inpaint)}
    elif task == "image2image":
        metadata |= {"task": task, "strength": settings.inpaint.strength}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    return metadata | parts.origin


def inpainting_method(parts: Components) -> str:
    """How this checkpoint inpaints: its UNet sees the mask, or the known region is restored at every step."""
    return "9 channels" if is_inpaint_unet(parts.unet) else "known region re-noised at every step"
