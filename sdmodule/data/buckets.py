"""Aspect-ratio buckets: image sizes of about one area and of many shapes, so that little is cropped.

The idea is NovelAI's "aspect ratio bucketing" (2022): each image is resized to the bucket whose shape is closest to
its own, and all images of a batch come from one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdmodule.errors import SettingsError, is_int

MAX_RATIO = 2.0
"""Largest ratio of the longer side to the shorter one; images of a more extreme shape are cropped to it."""

Size = tuple[int, int]
"""Height and width in pixels."""


def parse_size(resolution: int | Sequence[int]) -> Size:
    """The height and width that ``data.resolution`` gives; one number gives squares.

    Raises:
        SettingsError: if it is neither a number nor a pair of numbers.
    """
    size = tuple(resolution) if isinstance(resolution, Sequence) else (resolution, resolution)
    if len(size) != 2 or not all(is_int(side) and side > 0 for side in size):
        raise SettingsError(
            f"data.resolution={resolution}: must be a whole number of at least 1, or two as [height, width]."
        )
    return size[0], size[1]


def bucket_sizes(size: Size) -> list[Size]:
    """Buckets of at most the area of ``size``, which is one of them, from the tallest to the widest.

    Sides are multiples of an eighth of the square's side, at most 64 and at least 8 pixels, so that the latents and
    every level of the UNet have whole sizes.
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
    """The bucket whose aspect ratio is closest to an image's; of two equally close ones, the larger."""

    def distance(size: Size) -> tuple[float, int]:
        return abs(math.log(width / height) - math.log(size[1] / size[0])), -size[0] * size[1]

    return min(sizes, key=distance)
