"""What a training image comes with beside its caption: a control image, a mask, the weight of each place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdmodule.conditioning import inpaint
from sdmodule.conditioning.control import ControlGuide
from sdmodule.conditioning.random_masks import draw_masks
from sdmodule.errors import SettingsError
from sdmodule.training.rng import Generators

if TYPE_CHECKING:
    from sdmodule.module import StableDiffusionModule


def control(module: StableDiffusionModule, batch: Mapping[str, Any]) -> ControlGuide | None:
    """The ControlNet with the control images of a batch, ``conditioning`` ``[B, 3, H, W]`` in [0, 1].

    Raises:
        SettingsError: if there is a ControlNet and the data has no such images.
    """
    if module.controlnet is None:
        return None
    if "conditioning" not in batch:
        raise SettingsError("tuning=controlnet needs control images; set data.conditioning=canny or files.")
    return ControlGuide(module.controlnet, batch["conditioning"])


def spatial_loss_weights(
    module: StableDiffusionModule, batch: Mapping[str, Any], errors: Tensor, channels: Tensor | None
) -> Tensor:
    """How much the error of each place counts, ``[B, 1, h, w]``: that of a hole, that outside a mask."""
    weights = torch.ones_like(errors)
    if channels is not None:
        weights = weights + (module.holes.hole_weight - 1.0) * channels[:, :1]
    return module.objective.masking(weights, batch.get("mask"))


def mask_channels(
    module: StableDiffusionModule, batch: Mapping[str, Any], generator: Generators, whole: float
) -> Tensor:
    """The mask of each image and the latents of what it leaves, ``[B, 5, h, w]``.

    Masks are the batch's own, ``mask`` ``[B, 1, H, W]``, or else drawn, a share ``whole`` of them of everything.
    """
    images = batch["image"]
    masks = batch.get("mask")
    if masks is None:
        masks = draw_masks(len(images), images.shape[-2:], whole, generator)
    masks = masks.to(images)
    return inpaint.inpaint_channels(masks, module.encode_images({"image": inpaint.mask_out(images, masks)}, generator))
