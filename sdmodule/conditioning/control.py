"""Control images, and the residuals that a ControlNet computes from them for the UNet (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.canny import canny_edges
from sdmodule.conditioning.masked_image import as_list, read_image
from sdmodule.errors import SettingsError
from sdmodule.io.transparency import on_white


def read_controls(control: Any, edges: bool, count: int) -> list[Image.Image]:
    """Control images of ``count`` prompts, in RGB.

    Args:
        control: a path, a PIL image, an array or a tensor; or several, one for each prompt, in a list or a batch.
        edges: take the `canny_edges` of each image.
        count: number of prompts; a single image serves all of them.

    Raises:
        SettingsError: for an image that cannot be read, or another number of images.
    """
    given = as_list(control)
    if len(given) not in (1, count):
        raise SettingsError(f"control: {len(given)} images for {count} prompts; give one image, or one per prompt.")
    images = []
    for k, one in enumerate(given):
        image = on_white(read_image(one, "control" if len(given) == 1 else f"control[{k}]"))
        images.append(canny_edges(image) if edges else image)
    return images * (count // len(images))


@dataclass
class ControlGuide:
    """A ControlNet and the control images of a batch.

    Attributes:
        controlnet: the network.
        images: control images at the size of the samples, ``[B, 3, H, W]`` in [0, 1].
        scale: factor of the residuals.
    """

    controlnet: Any
    images: Tensor
    scale: float = 1.0

    def residuals(self, latents: Tensor, timestep: Tensor, told: Mapping[str, Any]) -> dict[str, Any]:
        """Residuals that the UNet adds to its features, as keyword arguments of its call.

        Args:
            latents: input of the UNet, ``[B or 2B, 4 or 9, h, w]``; 2B with classifier-free guidance.
            timestep: a scalar, or ``[B]``.
            told: what the denoiser is called with beside these; see ``Family.denoiser_arguments``.
        """
        images = self.images.repeat(len(latents) // len(self.images), 1, 1, 1).to(told["encoder_hidden_states"])
        # beside an inpainting UNet, a text-to-image ControlNet takes the noisy latents only
        noisy = latents[:, : self.controlnet.config.in_channels]
        down, middle = self.controlnet(
            noisy,
            timestep,
            **told,
            controlnet_cond=images,
            conditioning_scale=self.scale,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def prepare_control(
    parts: Components, controls: Sequence[Image.Image], size: Sequence[int], scale: float
) -> ControlGuide | None:
    """The `ControlGuide` of a batch, or None without control images.

    Args:
        parts: the model.
        controls: one control image for each sample, or none at all.
        size: ``(h, w)`` of the latents.
        scale: factor of the residuals.

    Raises:
        SettingsError: for control images without a ControlNet, or a ControlNet without control images.
    """
    check_control(bool(controls), parts.controlnet is not None)
    if not controls:
        return None
    height, width = (side * parts.pixels_per_latent for side in size)
    return ControlGuide(parts.controlnet, controls_to_tensor(controls, (height, width)).to(parts.unet.device), scale)


def controls_to_tensor(controls: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """Control images as a tensor ``[B, 3, H, W]`` in [0, 1], resized to ``size`` ``(H, W)``."""
    height, width = size
    arrays = [np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)) for image in controls]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def check_control(controls: bool, controlnet: bool) -> None:
    """Check that control images and a ControlNet come together or not at all.

    Raises:
        SettingsError: if only one of the two is there.
    """
    if controls and not controlnet:
        raise SettingsError("control: needs a ControlNet; add controlnet=FOLDER.")
    if controlnet and not controls:
        raise SettingsError("controlnet: needs a control image; add control=IMAGE.png.")
