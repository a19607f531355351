"""Makes the images of ``make demo``: one fox, each time on another plain background.

    python examples/make_fox.py sdmodule/components/assets/fox

The fox is that of the embedded emoji, cut out of its white background.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdmodule.components.source import ASSETS
from sdmodule.data.toy.scenes import COLOURS

BACKGROUNDS = {"train": ["blue", "green", "yellow", "purple", "white", "black"], "val": ["red", "orange"]}
"""Colours of the images that are trained on, and of those that show what was learned."""

OUTSIDE = (1, 2, 3)
"""A colour that the fox does not have, to mark what is around it."""


def main(folder: Path) -> None:
    """Write the images and their captions."""
    fox = cut_out(Image.open(ASSETS / "emoji" / "1f98a.png").convert("RGB"))
    for name, colours in BACKGROUNDS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = []
        for colour in colours:
            image = Image.new("RGBA", fox.size, COLOURS[colour])
            image.alpha_composite(fox)
            image.convert("RGB").save(folder / name / f"{colour}.png", optimize=True)
            article = "an" if colour == "orange" else "a"
            rows.append({"file_name": f"{colour}.png", "text": f"a zxq fox on {article} {colour} background"})
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut_out(image: Image.Image) -> Image.Image:
    """The image without the white around it.

    A pixel at the edge is a mixture of white and the colour next to it inside. Its opacity is the share of that
    colour, and it takes the colour itself, so that no white edge shows on another background.
    """
    marked = image.copy()
    for corner in ((0, 0), (image.width - 1, 0), (0, image.height - 1), (image.width - 1, image.height - 1)):
        ImageDraw.floodfill(marked, corner, OUTSIDE, thresh=12)
    pixels = np.asarray(image, dtype=float)
    outside = (np.asarray(marked) == OUTSIDE).all(axis=2)
    edge = neighbours(outside[..., None]).any(axis=0)[..., 0] & ~outside
    core = (~outside & ~edge)[..., None]
    inner = neighbours(pixels * core).sum(axis=0) / np.maximum(neighbours(core).sum(axis=0), 1)
    opacity = ((255 - pixels) * (255 - inner)).sum(axis=2) / np.maximum(((255 - inner) ** 2).sum(axis=2), 1)
    colours = np.where(edge[..., None], inner, pixels)
    opacity = np.where(edge, opacity.clip(0, 1), ~outside)
    return Image.fromarray(np.dstack([colours, 255 * opacity]).round().astype(np.uint8))


def neighbours(values: np.ndarray) -> np.ndarray:
    """The array ``[H, W, C]`` and its eight shifts by one pixel, ``[9, H, W, C]``; nothing lies beyond the border."""
    height, width, _ = values.shape
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)))
    return np.stack([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
