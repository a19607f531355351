"""Random masks for training an inpainting model: brush strokes and boxes.

The recipe is that of large-mask inpainting (Suvorov et al. 2022, section 3.3): half of the masks are polygonal chains
of wide strokes, half are boxes, all scaled to the image. Stable Diffusion's inpainting checkpoints were trained with
such masks, and with masks that cover the whole image for a quarter of the examples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def draw_masks(
    count: int, size: Sequence[int], whole: float, generator: torch.Generator | list[torch.Generator]
) -> Tensor:
    """Draw masks ``[count, 1, H, W]``, 1 where the image is inpainted and 0 where it is kept.

    Args:
        count: number of masks.
        size: height and width in pixels.
        whole: share of masks that cover the whole image.
        generator: one for all masks, or one for each; mask k does not depend on ``count``.
    """
    height, width = size
    generators = generator if isinstance(generator, list) else [generator] * count
    seeds = [int(torch.randint(2**62, (), generator=each)) for each in generators]
    masks = [draw_mask(random.Random(seed), height, width, whole) for seed in seeds]
    return torch.from_numpy(np.stack([np.asarray(mask) for mask in masks]))[:, None] / 255


def draw_mask(rng: random.Random, height: int, width: int, whole: float = 0.0) -> Image.Image:
    """Draw one mask, mode L, 255 or 0; never empty, and covering the whole image only with probability ``whole``."""
    if rng.random() < whole:
        return Image.new("L", (width, height), 255)
    paint = _strokes if rng.random() < 0.5 else _boxes
    while True:
        mask = Image.new("L", (width, height))
        paint(ImageDraw.Draw(mask), rng, height, width)
        if mask.getextrema() == (0, 255):
            return mask


def _boxes(draw: ImageDraw.ImageDraw, rng: random.Random, height: int, width: int) -> None:
    """One to three boxes, each side an eighth to three quarters of the image's."""
    for _ in range(rng.randint(1, 3)):
        w, h = (max(1, round(rng.uniform(1 / 8, 3 / 4) * side)) for side in (width, height))
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        draw.rectangle((x, y, x + w - 1, y + h - 1), fill=255)


def _strokes(draw: ImageDraw.ImageDraw, rng: random.Random, height: int, width: int) -> None:
    """One to four chains of strokes that zigzag, each up to two fifths of the shorter side thick."""
    side = min(height, width)
    for _ in range(rng.randint(1, 4)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        thickness = rng.uniform(side / 16, side * 2 / 5)
        for k in range(rng.randint(1, 5)):
            turn = rng.uniform(0, 2 * math.pi / 5)
            angle = 2 * math.pi - turn if k % 2 == 0 else turn
            length = rng.uniform(side / 16, side * 2 / 5)
            start, x, y = (x, y), x + length * math.sin(angle), y + length * math.cos(angle)
            x, y = min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))
            draw.line((*start, x, y), fill=255, width=max(1, round(thickness)))
            for cx, cy in (start, (x, y)):  # round ends
                r = thickness / 2
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
