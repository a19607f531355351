"""A control image to residuals: a ControlNet beside the UNet (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.canny import canny_edges
from sdmodule.conditioning.masked_image import read_image
from sdmodule.errors import SettingsError


def read_controls(control: Any, edges: bool, count: int) -> list[Image.Image]:
    """The control image of each of ``count`` prompts.

    Args:
        control: a path, a PIL image, an array or a tensor; or a list, one for each prompt.
        edges: it is a photo, of which the edges are taken; see `canny_edges`.
        count: prompts; one prompt takes as many images as there are.

    Raises:
        SettingsError: for an image that cannot be read, or another number of them.
    """
    given = list(control) if isinstance(control, (list, tuple)) else [control]
    if len(given) not in (1, count):
        raise SettingsError(f"control has {len(given)} images for {count} prompts; give one, or one for each prompt.")
    images = []
    for k, one in enumerate(given):
        image = read_image(one, "control" if len(given) == 1 else f"control[{k}]").convert("RGB")
        images.append(canny_edges(image) if edges else image)
    return images * (count // len(images))


@dataclass
class ControlGuide:
    """The control images of a batch, ready for the denoising loop.

    Attributes:
        controlnet: the network.
        images: at the size of the samples, ``[B, 3, H, W]`` in [0, 1].
        scale: how much the network counts.
    """

    controlnet: Any
    images: Tensor
    scale: float = 1.0

    def residuals(self, latents: Tensor, timestep: Tensor, embeddings: Tensor) -> dict[str, Any]:
        """What the UNet adds to its own features, as its keyword arguments.

        Args:
            latents: what the UNet sees, ``[B or 2B, 4 or 9, h, w]``; guidance asks twice.
            timestep: a scalar, or ``[B]``.
            embeddings: of the prompts, ``[B or 2B, L, D]``.
        """
        images = self.images.repeat(len(latents) // len(self.images), 1, 1, 1).to(embeddings)
        down, middle = self.controlnet(
            latents[:, : self.controlnet.config.in_channels],  # one of text-to-image beside a UNet that inpaints
            timestep,
            encoder_hidden_states=embeddings,
            controlnet_cond=images,
            conditioning_scale=self.scale,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def prepare_control(parts: Components, controls: Sequence[Image.Image], size: Sequence[int], scale: float) -> Any:
    """The guide of a batch; None without control images.

    Args:
        parts: the model.
        controls: one for each image of the batch, or none.
        size: ``(h, w)`` of the latents.
        scale: how much the network counts.

    Raises:
        SettingsError: for control images without a ControlNet, or the reverse.
    """
    check_control(bool(controls), parts.controlnet is not None)
    if not controls:
        return None
    height, width = (side * parts.pixels_per_latent for side in size)
    return ControlGuide(parts.controlnet, controls_to_tensor(controls, (height, width)).to(parts.unet.device), scale)


def controls_to_tensor(controls: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """Control images as ``[B, 3, H, W]`` in [0, 1], brought to ``size`` ``(H, W)`` where they are of another."""
    height, width = size
    arrays = [np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)) for image in controls]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def check_control(controls: bool, controlnet: bool) -> None:
    """Whether there are both a control image and a ControlNet, or neither.

    Raises:
        SettingsError: if there is one of them.
    """
    if controls and not controlnet:
        raise SettingsError("control was given and there is no ControlNet to follow it; add controlnet=FOLDER.")
    if controlnet and not controls:
        raise SettingsError("controlnet was given and there is no image to follow; add control=IMAGE.png.")
