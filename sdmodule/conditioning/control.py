"""Control images, and the residuals that ControlNets compute from them for the UNet (Zhang et al. 2023).

What is said of ControlNets holds for T2I-Adapters too, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import T2IAdapter
from PIL import Image
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.conditioning.canny import canny_edges
from sdmodule.conditioning.control_settings import ControlSettings, spread
from sdmodule.conditioning.masked_image import as_list, read_image
from sdmodule.conditioning.t2i_adapter import T2IGuide, t2i_guide
from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError
from sdmodule.io.transparency import on_white

Controls = tuple[Image.Image, ...]
"""The control images of one sample, one for each ControlNet."""

RESIDUALS = "down_block_additional_residuals", "mid_block_additional_residual"
"""Names of the UNet's arguments for the residuals of its blocks down and of its middle block."""


def read_control_sets(control: Any, edges: bool, count: int, nets: int = 1) -> list[Controls]:
    """Control images of ``count`` prompts, one for each ControlNet.

    Args:
        control: as `read_controls` takes it; for several ControlNets a list with one of these for each.
        edges: take the `canny_edges` of each image.
        count: number of prompts.
        nets: number of ControlNets.

    Raises:
        SettingsError: for an image that cannot be read, or another number of images.
    """
    if nets == 1:
        return [(image,) for image in read_controls(control, edges, count)]
    if not isinstance(control, (list, tuple)) or len(control) != nets:
        given = f"{len(control)} entries" if isinstance(control, (list, tuple)) else "one image"
        raise SettingsError(f"control: {given} for {nets} ControlNets; give a list with one entry for each of them.")
    each = [read_controls(one, edges, count, f"control[{k}]") for k, one in enumerate(control)]
    return list(zip(*each, strict=True))


def read_controls(control: Any, edges: bool, count: int, name: str = "control") -> list[Image.Image]:
    """Control images of ``count`` prompts, in RGB.

    Args:
        control: a path, a PIL image, an array or a tensor; or several, one for each prompt, in a list, a folder or a
            batch.
        edges: take the `canny_edges` of each image.
        count: number of prompts; a single image serves all of them.
        name: the setting that it is from, for messages.

    Raises:
        SettingsError: for an image that cannot be read, or another number of images.
    """
    given = as_list(control, name)
    if len(given) not in (1, count):
        raise SettingsError(f"{name}: {len(given)} images for {count} prompts; give one image, or one per prompt.")
    images = []
    for k, one in enumerate(given):
        image = on_white(read_image(one, name if len(given) == 1 else f"{name}[{k}]"))
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

    def residuals(
        self, latents: Tensor, timestep: Tensor, told: Mapping[str, Any], guess_mode: bool = False
    ) -> dict[str, Any]:
        """Residuals that the UNet adds to its features, as keyword arguments of its call.

        Args:
            latents: input of the UNet, ``[B or 2B, 4 or 9, h, w]``; 2B with classifier-free guidance.
            timestep: a scalar, or ``[B]``.
            told: what the denoiser is called with beside these; see ``Family.denoiser_arguments``.
            guess_mode: let residuals grow with depth.
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
            guess_mode=guess_mode,
            return_dict=False,
        )
        return dict(zip(RESIDUALS, (down, middle), strict=True))


@dataclass
class ControlStack:
    """The ControlNets of a batch, whose residuals add up.

    Attributes:
        guides: each with its control images and its scale.
        windows: shares of the steps at which each of them sets in and ends.
        guess_mode: whether they run on the prompts' half of a guided batch alone.
        steps: number of calls of the denoiser.
    """

    guides: Sequence[ControlGuide | T2IGuide]
    windows: Sequence[tuple[float, float]]
    guess_mode: bool
    steps: int

    def residuals(
        self, call: int, latents: Tensor, timestep: Tensor, told: Callable[[int], Mapping[str, Any]], guided: bool
    ) -> dict[str, Any]:
        """The sum of all residuals at a call of the denoiser, as keyword arguments of the UNet.

        Args:
            call: its number.
            latents: input of the UNet, ``[B or 2B, 4 or 9, h, w]``.
            timestep: a scalar.
            told: gives what the denoiser is told of the last rows of the batch, of which it takes the number.
            guided: whether the first half of the rows is for the negative prompts.
        """
        half = self.guess_mode and guided
        seen = latents.chunk(2)[1] if half else latents
        now: list[dict[str, Any]] = [
            guide.residuals(seen, timestep, told(len(seen)), self.guess_mode)
            for guide, (start, end) in zip(self.guides, self.windows, strict=True)
            if start <= call / self.steps and (call + 1) / self.steps <= end and guide.scale
        ]
        names = dict.fromkeys(name for one in now for name in one)
        summed = {name: sum_of([one[name] for one in now if name in one]) for name in names}
        return {name: behind_zeros(value) for name, value in summed.items()} if half else summed


def sum_of(residuals: Sequence[Any]) -> Any:
    """The sum of tensors, or of lists of tensors element by element."""
    first, *others = residuals
    for other in others:
        first = first + other if isinstance(first, Tensor) else [x + y for x, y in zip(first, other, strict=True)]
    return first


def behind_zeros(half: Any) -> Any:
    """Residuals of the prompts' half of a batch, with none for the negative prompts before it."""
    if isinstance(half, Tensor):
        return torch.cat([torch.zeros_like(half), half])
    return [behind_zeros(one) for one in half]


def prepare_control(
    parts: Components, controls: Sequence[Controls], size: Sequence[int], settings: ControlSettings, steps: int
) -> ControlStack | None:
    """The `ControlStack` of a batch, or None without control images.

    Args:
        parts: the model.
        controls: the control images of each sample, one for each ControlNet; or none at all.
        size: ``(h, w)`` of the latents.
        settings: scales and the rest.
        steps: number of calls of the denoiser.

    Raises:
        SettingsError: for control images without a ControlNet, or a ControlNet without control images.
    """
    nets = parts.controlnets
    check_control(bool(controls), bool(nets))
    if not controls:
        return None
    height, width = (side * parts.pixels_per_latent for side in size)
    scales = spread(settings.scale, len(nets), "control_scale")
    starts = spread(settings.start, len(nets), "control_guidance_start")
    ends = spread(settings.end, len(nets), "control_guidance_end")
    guides = [
        guide_of(net, images, (height, width), scale, parts.unet)
        for net, images, scale in zip(nets, zip(*controls, strict=True), scales, strict=True)
    ]
    pooled = any(net.config.get("global_pool_conditions") for net in nets)  # as diffusers does for these
    return ControlStack(guides, list(zip(starts, ends, strict=True)), settings.guess_mode or pooled, steps)


def guide_of(
    net: Any, images: Sequence[Image.Image], size: tuple[int, int], scale: float, unet: Any
) -> ControlGuide | T2IGuide:
    """A ControlNet or T2I-Adapter with its control images."""
    tensor = upload(controls_to_tensor(images, size), unet.device)
    if isinstance(net, T2IAdapter):
        return t2i_guide(net, tensor.to(unet.dtype), scale)
    return ControlGuide(net, tensor, scale)


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
