"""The validation loss, comparable between runs and between training objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.families.conditioning import Conditioning
from sdmodule.training.accumulation import batch_size_of, validation_loader
from sdmodule.training.inpaint import InpaintTraining
from sdmodule.training.loss import Conditions, control_guide, denoising_errors, encode_images, mask_channels
from sdmodule.training.objective import SQUARED_ERROR
from sdmodule.training.step_inputs import draw_latent_noise, draw_mask_inputs

TIMESTEP_RANGES = 4
"""Equal ranges of timesteps; every image is noised to the middle of each."""

NO_FULL_MASKS = InpaintTraining(full_mask_share=0.0)
"""Validation draws no mask that covers the whole image."""


def without_repeats(
    batch: dict[str, Any], batch_idx: int, trainer: Trainer | None, dataloader_idx: int = 0
) -> tuple[dict[str, Any], int]:
    """A validation batch without the examples that only fill up the devices' equal shares, and how many are left.

    Distributed sampling gives example ``k`` of all to device ``k % devices``, and repeats the first ones at the end. If
    all of a batch are repeats, one stays in it and counts nothing.
    """
    count = len(batch.get("image", batch.get("moments")))  # type: ignore[arg-type]
    if trainer is None or trainer.world_size == 1:
        return batch, count
    loader = validation_loader(trainer, dataloader_idx)
    try:
        total = len(loader.dataset)
    except (AttributeError, TypeError):  # not a loader of a data set with a length
        return batch, count
    first = batch_idx * (batch_size_of(loader) or count)
    own = sum((first + k) * trainer.world_size + trainer.global_rank < total for k in range(count))
    kept = max(own, 1)
    return {name: value[:kept] for name, value in batch.items()}, own


def validation_losses(
    parts: Components,
    batch: Mapping[str, Any],
    text: Conditioning,
    generators: Sequence[torch.Generator],
    inpainting: bool = False,
) -> dict[str, Tensor]:
    """Mean squared errors of a batch, with the same noise for an image in every run.

    Args:
        parts: the model.
        batch: images with captions.
        text: the captions, with the sizes of the images.
        generators: one per image.
        inpainting: whether the UNet is given masks.

    Returns:
        ``loss``, the mean over all ranges of timesteps; ``loss_FIRST_LAST`` of each range; and for inpainting
        ``loss_masked_area`` and ``loss_unmasked_area``.
    """
    generators = list(generators)
    latents = encode_images(parts, batch, draw_latent_noise(parts, batch, generators))
    drawn = draw_mask_inputs(parts, batch, generators, NO_FULL_MASKS if inpainting else None)
    channels = mask_channels(parts, batch, drawn)
    conditions = Conditions(text, channels, control_guide(parts.controlnet, batch))
    width = len(parts.scheduler.alphas_cumprod) // TIMESTEP_RANGES
    errors, losses = [], {}
    for start in range(0, width * TIMESTEP_RANGES, width):
        timesteps = torch.full((len(latents),), start + width // 2, device=latents.device)
        noise = SQUARED_ERROR.draw_noise(latents, generators)
        errors.append(denoising_errors(parts, latents, noise, timesteps, conditions))
        losses[f"loss_{start}_{start + width - 1}"] = errors[-1].mean()
    mean = torch.stack(errors).mean(dim=0)
    if channels is not None:
        mask = channels[:, :1]
        losses["loss_masked_area"] = (mean * mask).sum() / mask.sum().clamp(min=1)
        losses["loss_unmasked_area"] = (mean * (1 - mask)).sum() / (1 - mask).sum().clamp(min=1)
    return {"loss": mean.mean(), **losses}
