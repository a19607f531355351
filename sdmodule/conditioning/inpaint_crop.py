"""Crop an image to the part that is inpainted, at the model's resolution, and paste the result back."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from sdmodule.conditioning.masked_image import MaskedImage
from sdmodule.errors import SettingsError, check_bool, check_int, check_number
from sdmodule.io.images import image_to_tensor
from sdmodule.io.transparency import on_white

Box = tuple[int, int, int, int]
"""``(x0, y0, x1, y1)`` in pixels; ``x1`` and ``y1`` are exclusive."""


@dataclass(frozen=True)
class InpaintSettings:
    """How a masked image is inpainted.

    Args:
        strength: share of the schedule to denoise: 1 starts from pure noise, less keeps some of the masked content.
        mask_blur: radius in pixels of the blur on the mask's edge, for pasting the result.
        only_masked: inpaint a crop around the masked area at the model's full resolution.
        padding: pixels of context around the masked area with ``only_masked``.

    Raises:
        SettingsError: for a value out of range.
    """

    strength: float = 1.0
    mask_blur: float = 0.0
    only_masked: bool = False
    padding: int = 32

    def __post_init__(self) -> None:
        check_number("strength", self.strength, above=0, maximum=1)
        check_number("mask_blur", self.mask_blur, minimum=0)
        check_bool("only_masked", self.only_masked)
        check_int("padding", self.padding, minimum=0)


@dataclass
class InpaintCrop:
    """The part of an image that the model inpaints.

    Attributes:
        image: the crop at the model's size, ``[3, H, W]`` in [-1, 1].
        mask: its mask, ``[1, H, W]``, 1 or 0.
        box: where the crop lies in the image.
        edge: opacity of the result when it is pasted, of the whole image's size, mode L.
    """

    image: Tensor
    mask: Tensor
    box: Box
    edge: Image.Image


def crop_for_inpainting(masked: MaskedImage, height: int, width: int, settings: InpaintSettings) -> InpaintCrop:
    """Crop a masked image and resize the crop to ``height`` by ``width`` pixels."""
    edge = masked.mask.filter(ImageFilter.GaussianBlur(settings.mask_blur)) if settings.mask_blur else masked.mask
    whole = (0, 0, *masked.image.size)
    box = whole
    if settings.only_masked:
        box = crop_box(edge.getbbox() or whole, settings.padding, width / height, whole)
    image, mask = on_white(masked.image).crop(box), masked.mask.crop(box)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        mask = mask.resize((width, height), Image.Resampling.NEAREST)
    binary = torch.from_numpy(np.array(mask, dtype=np.float32) / 255.0)[None]
    return InpaintCrop(image_to_tensor(image), binary, box, edge)


def crop_box(masked: Box, padding: int, aspect: float, whole: Box) -> Box:
    """Box around a masked area: padded, extended towards the ``aspect`` ratio, and kept within ``whole``."""
    x0, y0, x1, y1 = masked[0] - padding, masked[1] - padding, masked[2] + padding, masked[3] + padding
    width, height = max(x1 - x0, round((y1 - y0) * aspect)), max(y1 - y0, round((x1 - x0) / aspect))
    left, right = _extend(x0, x1, width, whole[2])
    top, bottom = _extend(y0, y1, height, whole[3])
    return left, top, right, bottom


def _extend(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """Extend a span to ``length``, centred where it fits, and kept within 0 to ``limit``."""
    length = min(length, limit)
    first = min(max(start - (length - (end - start)) // 2, 0), limit - length)
    return first, first + length


def paste_back(crop: InpaintCrop, inpainted: Image.Image, image: Image.Image) -> Image.Image:
    """Paste an inpainted crop into a copy of the image; pixels outside the mask's edge are unchanged, alpha too."""
    x0, y0, x1, y1 = crop.box
    if inpainted.size != (x1 - x0, y1 - y0):
        inpainted = inpainted.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    result = image.copy()
    result.paste(inpainted, (x0, y0), crop.edge.crop(crop.box))
    if result.mode == "RGBA" and result.getchannel("A").getextrema() == (255, 255):  # nothing transparent is left
        return result.convert("RGB")
    return result


def check_inpaint_settings(settings: InpaintSettings, task: str) -> None:
    """Check that settings of inpainting are left at their defaults where they have no effect.

    Raises:
        SettingsError: for changed settings with the ``task`` ``text2image``.
    """
    defaults = asdict(InpaintSettings())
    changed = [f"{name}={value}" for name, value in asdict(settings).items() if value != defaults[name]]
    if changed and task == "text2image":
        raise SettingsError(
            f"{', '.join(changed)}: no effect with model=text2image; use model=inpaint, or leave it out."
        )
