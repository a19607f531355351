"""The loss on images that are not trained on, measured so that runs can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdmodule.sampling.requests import INPAINT
from sdmodule.training.objective import SQUARED_ERROR
from sdmodule.training.rng import validation_generators

if TYPE_CHECKING:
    from sdmodule.module import StableDiffusionModule

RANGES = 4
"""Equal ranges of timesteps, in the middle of each of which every image is tried."""


def validation_losses(module: StableDiffusionModule, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
    """Mean squared errors of a batch, whatever the objective of training: an image's noise is the same in every run.

    Args:
        module: the model.
        batch: images with captions.
        batch_idx: its number.

    Returns:
        ``loss``, the mean over all ranges of timesteps; ``loss_FIRST_LAST`` of each of them; and for a model that
        inpaints ``loss_hole`` and ``loss_kept``, inside and outside of the mask.
    """
    generators = validation_generators(module.seed, len(batch["caption"]), batch_idx, module._trainer)
    latents = module.encode_images(batch, generators)
    channels = module.mask_channels(batch, generators, whole=0.0) if module.task == INPAINT else None
    width = len(module.alphas_cumprod) // RANGES
    levels, losses = [], {}
    for start in range(0, width * RANGES, width):
        timesteps = torch.full((len(latents),), start + width // 2, device=module.device)
        noise = SQUARED_ERROR.draw_noise(latents, generators)
        control = module.control(batch)
        errors = module.denoising_errors(latents, noise, timesteps, batch["caption"], channels, control=control)
        levels.append(errors)
        losses[f"loss_{start}_{start + width - 1}"] = errors.mean()
    errors = torch.stack(levels).mean(dim=0)
    if channels is not None:
        hole = channels[:, :1]
        losses["loss_hole"] = (errors * hole).sum() / hole.sum().clamp(min=1)
        losses["loss_kept"] = (errors * (1 - hole)).sum() / (1 - hole).sum().clamp(min=1)
    return {"loss": errors.mean(), **losses}
