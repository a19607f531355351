"""Sizes of about one area and of many shapes, so that images are cropped little (aspect-ratio buckets).

The idea is that of NovelAI's "aspect ratio bucketing" (2022): each image goes to the size of the most similar shape,
and a batch is of one size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_RATIO = 2.0
"""Of the longer side to the shorter one; an image of a more extreme shape is cropped to this."""

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(size: Size) -> list[Size]:
    """The sizes of at most the area of ``size``, itself among them, from the tallest to the widest.

    Sides are multiples of an eighth of the square's side, at most 64 pixels and at least 8, so that latents and the
    UNet's levels have whole sizes.
    """
    height, width = size
    area = height * width
    step = min(64, max(8, math.isqrt(area) // 64 * 8))
    sizes = {size}
    for side in range(step, math.isqrt(int(area * MAX_RATIO)) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= MAX_RATIO * min(side, other):
            sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


def nearest_bucket(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size whose shape is most like that of an image; the larger of two alike."""

    def difference(size: Size) -> tuple[float, int]:
        return abs(math.log(width / height) - math.log(size[1] / size[0])), -size[0] * size[1]

    return min(sizes, key=difference)
