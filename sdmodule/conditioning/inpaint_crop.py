"""Where a model paints in an image: the part that it sees, at the size that it works at, and the way back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from sdmodule.conditioning.masked_image import MaskedImage
from sdmodule.errors import SettingsError
from sdmodule.io.images import image_to_tensor
from sdmodule.ranges import check_flag

Box = tuple[int, int, int, int]
"""``(x0, y0, x1, y1)`` in pixels, the last two exclusive."""


@dataclass(frozen=True)
class InpaintSettings:
    """How a masked image is repainted.

    Args:
        strength: share of the schedule that is walked: 1 starts from noise alone, less keeps something of what the
            hole shows now.
        mask_blur: radius in pixels of the soft edge with which the new part is laid over the old one.
        only_masked: work on the part of the image round the hole alone, at the model's own resolution.
        padding: pixels of the image round the hole that ``only_masked`` lets the model see.

    Raises:
        SettingsError: for a value out of range.
    """

    strength: float = 1.0
    mask_blur: float = 0.0
    only_masked: bool = False
    padding: int = 32

    def __post_init__(self) -> None:
        if not _is_number(self.strength) or not 0.0 < self.strength <= 1.0:
            raise SettingsError(f"strength={self.strength} is not allowed; give a number over 0 and at most 1.")
        if not _is_number(self.mask_blur) or not 0.0 <= self.mask_blur < math.inf:
            raise SettingsError(f"mask_blur={self.mask_blur} is not allowed; give a radius in pixels, 0 or more.")
        check_flag("only_masked", self.only_masked)
        if isinstance(self.padding, bool) or not isinstance(self.padding, int) or self.padding < 0:
            raise SettingsError(f"padding={self.padding} is not allowed; give a whole number of pixels, 0 or more.")


@dataclass
class InpaintCrop:
    """The part of an image that a model works on.

    Attributes:
        image: what the model sees, ``[3, H, W]`` in [-1, 1].
        mask: where it repaints, ``[1, H, W]``, 1 or 0.
        box: which part of the image that is.
        edge: how opaque the result lies over the image, of the image's size, mode L.
    """

    image: Tensor
    mask: Tensor
    box: Box
    edge: Image.Image


def crop_for_inpainting(masked: MaskedImage, height: int, width: int, settings: InpaintSettings) -> InpaintCrop:
    """Cut out what the model works on, at ``width`` by ``height`` pixels."""
    edge = masked.mask.filter(ImageFilter.GaussianBlur(settings.mask_blur)) if settings.mask_blur else masked.mask
    whole = (0, 0, *masked.image.size)
    box = (
        box_around(edge.getbbox() or whole, settings.padding, width / height, whole) if settings.only_masked else whole
    )
    part, hole = masked.image.crop(box), masked.mask.crop(box)
    if part.size != (width, height):
        part = part.resize((width, height), Image.Resampling.LANCZOS)
        hole = hole.resize((width, height), Image.Resampling.NEAREST)
    mask = torch.from_numpy(np.array(hole, dtype=np.float32) / 255.0)[None]
    return InpaintCrop(image_to_tensor(part), mask, box, edge)


def box_around(hole: Box, padding: int, aspect: float, whole: Box) -> Box:
    """The part of an image round a hole: padded, widened or heightened towards ``aspect``, kept within ``whole``."""
    x0, y0, x1, y1 = hole[0] - padding, hole[1] - padding, hole[2] + padding, hole[3] + padding
    wanted = max(x1 - x0, round((y1 - y0) * aspect)), max(y1 - y0, round((x1 - x0) / aspect))
    left, right = _span(x0, x1, wanted[0], whole[2])
    top, bottom = _span(y0, y1, wanted[1], whole[3])
    return left, top, right, bottom


def _span(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """A span of ``length`` round another one, shifted into 0 to ``limit`` and no longer than that."""
    length = min(length, limit)
    first = min(max(start - (length - (end - start)) // 2, 0), limit - length)
    return first, first + length


def paste_back(canvas: InpaintCrop, painted: Image.Image, image: Image.Image) -> Image.Image:
    """Lay what was painted over the image; outside the edge every pixel is the image's own."""
    x0, y0, x1, y1 = canvas.box
    if painted.size != (x1 - x0, y1 - y0):
        painted = painted.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    result = image.copy()
    result.paste(painted, (x0, y0), canvas.edge.crop(canvas.box))
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_inpaint_settings(settings: InpaintSettings, task: str) -> None:
    """Settings of inpainting mean nothing to a model that makes images from text: refuse them.

    Raises:
        SettingsError: for a ``task`` of ``text2image`` and settings that are not the usual ones.
    """
    usual = asdict(InpaintSettings())
    changed = [f"{name}={value}" for name, value in asdict(settings).items() if value != usual[name]]
    if changed and task == "text2image":
        raise SettingsError(
            f"{', '.join(changed)} was given and model=text2image repaints nothing; use model=inpaint, or leave it out."
        )
