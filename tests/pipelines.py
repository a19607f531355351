"""Pipelines of diffusers over the parts of a model, to compare with."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPipeline

from sdmodule.components.checkpoint import Components
from sdmodule.components.schedulers import make_scheduler


def diffusers_pipeline(
    parts: Components, kind: Any = StableDiffusionPipeline, scheduler: Any = None, **more: Any
) -> Any:
    """A pipeline of diffusers without a progress bar, with the scheduler that ``infer`` would take."""
    pipeline = kind(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=make_scheduler(scheduler, parts.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
