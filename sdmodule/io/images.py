"""Images as files, arrays and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdmodule.errors import SettingsError, choices


def image_to_tensor(image: Image.Image) -> Tensor:
    """Turn an RGB image into a tensor ``[3, H, W]`` in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 255.0
    return torch.from_numpy(2.0 * array - 1.0).permute(2, 0, 1).contiguous()  # diffusers' arithmetic, to the bit


def to_images(images: Tensor) -> list[Image.Image]:
    """Turn images ``[B, 3, H, W]`` in [0, 1] into PIL images, each value rounded to the nearest of 256."""
    arrays = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(array) for array in arrays]


def convert_images(images: Tensor, return_type: str) -> Any:
    """Images ``[B, 3, H, W]`` in [0, 1] as PIL images, as an array ``[B, H, W, 3]``, or as they are.

    Raises:
        SettingsError: for another return type.
    """
    forms = {"image": to_images, "numpy": lambda p: p.permute(0, 2, 3, 1).numpy(), "tensor": lambda p: p}
    if return_type not in forms:
        raise SettingsError(f"return_type={return_type!r} is not known; give one of {choices(forms)}.")
    return forms[return_type](images)


def contact_sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Paste images of one size side by side, ``columns`` in a row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def captioned_sheet(images: Sequence[Image.Image], captions: Sequence[str], tile: int = 192) -> Image.Image:
    """Put images side by side, each above its caption, in a sheet about as wide as it is high.

    Args:
        images: images of any sizes; each is fitted into a square of ``tile`` pixels.
        captions: one line of text each, broken into as many lines as it takes.
        tile: side of an image's square in pixels.
    """
    font = ImageFont.load_default(12)
    columns = math.ceil(math.sqrt(len(images)))
    wrapped = [break_lines(caption, font, tile) for caption in captions]
    line = 15
    row_height = tile + line * max(map(len, wrapped)) + 12
    sheet = Image.new("RGB", (columns * (tile + 8) + 8, -(-len(images) // columns) * row_height + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = 8 + k % columns * (tile + 8), 8 + k // columns * row_height
        scale = tile / max(image.size)
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else None), (x, y))
        draw.multiline_text((x, y + tile + 2), "\n".join(lines), fill="black", font=font, spacing=0)
    return sheet


def break_lines(text: str, font: Any, width: int, most: int = 4) -> list[str]:
    """Break text into lines of at most ``width`` pixels, at blanks where there are any; the rest is left to dots."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            cut = max(k for k in range(1, len(word) + 1) if font.getlength(word[:k]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line] or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], "…"]
