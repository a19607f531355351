"""Bars with their figures, drawn with pillow: a chart of one kind is not worth a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, ROW, NAMES, MARGIN = 680, 24, 250, 16
OURS, THEIRS, GUIDE = "#1f77b4", "#a0a0a0", "#d62728"


@dataclass(frozen=True)
class Bar:
    """A named figure; ``ours`` are told from what they are compared with by their colour."""

    name: str
    value: float
    ours: bool


def draw_bars(charts: Sequence[tuple[str, Sequence[Bar]]]) -> Image.Image:
    """Draw charts one below the other, each a title and bars of times, with a line where both are alike.

    Args:
        charts: titles, and how many times something each bar is.
    """
    tiles = [_draw(title, bars) for title, bars in charts]
    image = Image.new("RGB", (WIDTH, sum(tile.height for tile in tiles)), "white")
    down = 0
    for tile in tiles:
        image.paste(tile, (0, down))
        down += tile.height
    return image


def _draw(title: str, bars: Sequence[Bar]) -> Image.Image:
    image = Image.new("RGB", (WIDTH, ROW * (len(bars) + 2)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    unit = (WIDTH - NAMES - MARGIN - 50) / max(1.0, *(bar.value for bar in bars))
    pen.text((MARGIN, ROW / 2), title, "black", ImageFont.load_default(15), anchor="lm")
    for k, bar in enumerate(bars, start=1):
        top, end = k * ROW + 4, NAMES + bar.value * unit
        pen.rectangle([NAMES, top, end, top + ROW - 8], OURS if bar.ours else THEIRS)
        pen.text((NAMES - 8, top + ROW / 2 - 4), bar.name, "black", font, anchor="rm")
        pen.text((end + 6, top + ROW / 2 - 4), f"{bar.value:.2f}", "black", font, anchor="lm")
    pen.line([(NAMES + unit, ROW), (NAMES + unit, ROW * (len(bars) + 1))], GUIDE)
    return image
