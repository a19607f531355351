"""The images of one batch, and how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdmodule.conditioning.inpaint_crop import InpaintCrop, paste_back
from sdmodule.errors import SettingsError
from sdmodule.io.images import convert_images, image_to_tensor, in_unit_range, to_images
from sdmodule.io.transparency import on_white
from sdmodule.sampling.decode import Decoding
from sdmodule.sampling.requests import SampleRequest
from sdmodule.sampling.stopwatch import StageSeconds, StepSeconds


@dataclass
class Samples:
    """Images of one batch.

    Attributes:
        made: what the VAE returned, ``[B, 3, H, W]`` on the CPU, in [0, 1] or as bytes, or on its way there; or a list
            of images of different sizes; None if nothing was decoded.
        requests: what was asked for, one per image.
        seconds: time of each stage: ``text``, ``encode`` for input images, ``denoise``, ``decode``.
        metadata: settings that hold for the whole batch, in plain types.
        crops: for inpainting, the part of each image that was inpainted.
        places: each image's row in its batch, and the batch's size; the last bit of an image may depend on them, since
            sums of floating-point numbers do.
        step_seconds: time of each denoising step.
        latents: before decoding, ``[B, 4, h, w]``; None for images of different sizes.
    """

    made: Tensor | list[Tensor] | Decoding | None
    requests: list[SampleRequest]
    seconds: Mapping[str, float] | StageSeconds
    metadata: dict[str, Any] = field(default_factory=dict)
    crops: list[InpaintCrop] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    step_seconds: Sequence[float] | StepSeconds = field(default_factory=list)
    latents: Tensor | None = None

    @property
    def on_their_way(self) -> bool:
        """Whether the images are still on their way from a GPU, which to read them waits for."""
        return isinstance(self.made, Decoding)

    @property
    def decoded(self) -> Tensor | list[Tensor] | None:
        """The images in [0, 1], float32: ``[B, 3, H, W]``, or a list of different sizes; None if there are none."""
        arrived = self._arrived()
        if isinstance(arrived, list):
            return [in_unit_range(one) for one in arrived]
        return None if arrived is None else in_unit_range(arrived)

    def _arrived(self) -> Tensor | list[Tensor] | None:
        if isinstance(self.made, Decoding):
            self.made = self.made.result()
        return self.made

    @classmethod
    def joined(cls, batches: Sequence[Samples], requests: list[SampleRequest], order: Sequence[int]) -> Samples:
        """One result of several batches.

        Args:
            batches: in the order in which they were sampled.
            requests: in the order asked for.
            order: for each request, its position among the images of all batches.
        """
        crops = [crop for batch in batches for crop in batch.crops]
        places = [place for batch in batches for place in batch.places]
        return cls(
            _together([batch._arrived() for batch in batches], order),
            requests,
            {stage: sum(batch.seconds[stage] for batch in batches) for stage in batches[0].seconds},
            batches[0].metadata,
            [crops[k] for k in order] if crops else [],
            [places[k] for k in order],
            [step for batch in batches for step in batch.step_seconds],
            _latents([batch.latents for batch in batches], order),
        )

    def images(self) -> list[Image.Image]:
        """The finished images; an inpainted one is pasted into its original, at the original's size."""
        arrived = self._arrived()
        assert arrived is not None
        made = [to_images(one[None])[0] for one in arrived]
        if not self.crops:
            return made
        originals = [request.masked.image for request in self.requests if request.masked is not None]
        return [paste_back(*each) for each in zip(self.crops, made, originals, strict=True)]

    def converted(self, return_type: str) -> Any:
        """The finished images as PIL images, an array or a tensor (see `convert_images`), or the latents.

        Raises:
            SettingsError: for an array or a tensor of images of different sizes.
        """
        if return_type == "latent":
            return self.latents
        arrived = self._arrived()
        if isinstance(arrived, Tensor) and not self.crops:
            return convert_images(arrived, return_type)
        images = self.images()
        if return_type == "image":
            return images
        if len({image.size for image in images}) > 1:
            raise SettingsError(f"return_type={return_type!r}: images must be of one size; use return_type='image'.")
        return convert_images(
            torch.stack([image_to_tensor(on_white(image)) for image in images]) / 2 + 0.5, return_type
        )


def _together(batches: Sequence[Any], order: Sequence[int]) -> Any:
    """The images of batches as one tensor in another order, or as a list if their sizes differ."""
    if any(batch is None for batch in batches):
        return None
    if len({batch.shape[1:] for batch in batches}) == 1:
        return torch.cat(list(batches))[list(order)]
    images = [image for batch in batches for image in batch]
    return [images[k] for k in order]


def _latents(batches: Sequence[Tensor | None], order: Sequence[int]) -> Tensor | None:
    together = _together(batches, order)
    return together if isinstance(together, Tensor) else None
