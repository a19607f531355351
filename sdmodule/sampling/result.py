"""The pictures of one batch, and how they came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdmodule.conditioning.inpaint_crop import Canvas, paste
from sdmodule.errors import SettingsError
from sdmodule.io.images import converted, image_to_tensor, to_images
from sdmodule.sampling.requests import SampleRequest


@dataclass
class Samples:
    """Pictures of one batch.

    Attributes:
        pictures: what the model made, ``[B, 3, H, W]`` in [0, 1], float32, on the CPU.
        requests: what each picture was asked to be.
        seconds: time of each stage: ``text``, ``denoise``, ``decode``.
        facts: settings that hold for the whole batch, in plain types.
        canvases: for inpainting, the part of each picture that the model worked on.
        places: each picture's row in the tensors that were computed at once, and how many rows they had; sums of
            floating-point numbers, and so the last bit of a picture, may depend on it.
        step_seconds: time of each denoising step.
    """

    pictures: Tensor
    requests: list[SampleRequest]
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    canvases: list[Canvas] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def images(self) -> list[Image.Image]:
        """The finished pictures; what was repainted lies in its picture, at that picture's own size."""
        made = to_images(self.pictures)
        if not self.canvases:
            return made
        originals = [request.masked.picture for request in self.requests if request.masked is not None]
        return [paste(*parts) for parts in zip(self.canvases, made, originals, strict=True)]

    def converted(self, return_type: str) -> Any:
        """The finished pictures as `pictures.converted` gives them.

        Raises:
            SettingsError: for an array or a tensor of pictures of different sizes.
        """
        if not self.canvases:
            return converted(self.pictures, return_type)
        images = self.images()
        if return_type == "image":
            return images
        if len({image.size for image in images}) > 1:
            raise SettingsError(f"return_type={return_type!r} needs pictures of one size; use return_type='image'.")
        return converted(torch.stack([image_to_tensor(image) for image in images]) / 2 + 0.5, return_type)
