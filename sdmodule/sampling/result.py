"""The images of one batch, and how they came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdmodule.conditioning.inpaint_crop import InpaintCrop, paste_back
from sdmodule.errors import SettingsError
from sdmodule.io.images import convert_images, image_to_tensor, to_images
from sdmodule.sampling.requests import SampleRequest


@dataclass
class Samples:
    """Images of one batch.

    Attributes:
        decoded: what the model made, ``[B, 3, H, W]`` in [0, 1], float32, on the CPU.
        requests: what each image was asked to be.
        seconds: time of each stage: ``text``, ``denoise``, ``decode``.
        metadata: settings that hold for the whole batch, in plain types.
        crops: for inpainting, the part of each image that the model worked on.
        places: each image's row in the tensors that were computed at once, and how many rows they had; sums of
            floating-point numbers, and so the last bit of an image, may depend on it.
        step_seconds: time of each denoising step.
    """

    decoded: Tensor
    requests: list[SampleRequest]
    seconds: dict[str, float]
    metadata: dict[str, Any] = field(default_factory=dict)
    crops: list[InpaintCrop] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def images(self) -> list[Image.Image]:
        """The finished images; what was repainted lies in its image, at that image's own size."""
        made = to_images(self.decoded)
        if not self.crops:
            return made
        originals = [request.masked.image for request in self.requests if request.masked is not None]
        return [paste_back(*parts) for parts in zip(self.crops, made, originals, strict=True)]

    def converted(self, return_type: str) -> Any:
        """The finished images as `images.convert_images` gives them.

        Raises:
            SettingsError: for an array or a tensor of images of different sizes.
        """
        if not self.crops:
            return convert_images(self.decoded, return_type)
        images = self.images()
        if return_type == "image":
            return images
        if len({image.size for image in images}) > 1:
            raise SettingsError(f"return_type={return_type!r} needs images of one size; use return_type='image'.")
        return convert_images(torch.stack([image_to_tensor(image) for image in images]) / 2 + 0.5, return_type)
