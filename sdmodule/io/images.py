"""Images as PIL images, arrays and tensors, and sheets of several."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdmodule.errors import check_choice
from sdmodule.io.transparency import on_white

RETURN_TYPES = ("image", "numpy", "tensor")
"""Forms that sampled images are returned in."""

LONGEST_LINE = 500
"""Characters of a line on a sheet; more are never measured."""


def image_to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a tensor ``[3, H, W]`` in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 255.0
    return torch.from_numpy(2.0 * array - 1.0).permute(2, 0, 1).contiguous()  # diffusers' arithmetic, to the bit


def to_images(images: Tensor) -> list[Image.Image]:
    """Images ``[B, 3, H, W]`` in [0, 1] as PIL images; values but bytes are rounded, not truncated, to 8 bits."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    if arrays.dtype != np.uint8:
        arrays = (arrays * 255).round().astype(np.uint8)
    return [Image.fromarray(array) for array in arrays]


def in_unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1], float32, from such or from bytes."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def convert_images(images: Tensor, return_type: str) -> Any:
    """Images ``[B, 3, H, W]`` in [0, 1] in another form.

    Args:
        images: the images.
        return_type: ``image`` for PIL images, ``numpy`` for an array ``[B, H, W, 3]``, ``tensor`` for the same tensor.

    Raises:
        SettingsError: for another return type.
    """
    check_choice("return_type", return_type, RETURN_TYPES)
    if return_type == "image":
        return to_images(images)
    images = in_unit_range(images)
    return images if return_type == "tensor" else images.permute(0, 2, 3, 1).numpy()


def contact_sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Images of one size in a grid of ``columns`` columns, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def captioned_sheet(images: Sequence[Image.Image], captions: Sequence[str], tile: int = 192) -> Image.Image:
    """Images in a roughly square grid, each above its caption, on white.

    Args:
        images: images of any sizes; each is fitted into a square of ``tile`` pixels.
        captions: one caption per image, wrapped to the width of the square.
        tile: side of the square in pixels.
    """
    font = ImageFont.load_default(12)
    columns = math.ceil(math.sqrt(len(images)))
    wrapped = [wrap_text(caption, font, tile) for caption in captions]
    line = 15
    row_height = tile + line * max(map(len, wrapped)) + 12
    sheet = Image.new("RGB", (columns * (tile + 8) + 8, -(-len(images) // columns) * row_height + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = 8 + k % columns * (tile + 8), 8 + k // columns * row_height
        scale = tile / max(image.size)
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        sheet.paste(on_white(image).resize(size, Image.Resampling.NEAREST if scale > 1 else None), (x, y))
        draw.multiline_text((x, y + tile + 2), "\n".join(lines), fill="black", font=font, spacing=0)
    return sheet


def wrap_text(text: str, font: Any, width: int, max_lines: int = 4) -> list[str]:
    """Wrap text to lines of at most ``width`` pixels, at spaces if possible; the rest after ``max_lines`` is "…"."""

    def fits(part: str) -> bool:
        return len(part) <= LONGEST_LINE and font.getlength(part) <= width

    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer):
            lines[-1] = longer
            continue
        lines.append(word)
        while len(lines) <= max_lines + 1 and not fits(lines[-1]):
            word = lines.pop()
            lengths = range(1, min(len(word), LONGEST_LINE))
            cut = 1 + bisect_left(lengths, True, key=lambda length: not fits(word[: length + 1]))
            lines += [word[:cut], word[cut:]]
        if len(lines) > max_lines + 1:
            break
    lines = [line for line in lines if line] or [""]
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], "…"]
