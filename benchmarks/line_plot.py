"""Line plots, drawn with pillow: two small charts are not worth a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 620, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 46, 56
COLOURS = ("#7f7f7f", "#1f77b4", "#2ca02c", "#d62728", "#c7a500", "#17becf", "#9467bd", "#e377c2")
TICKS = 5


@dataclass(frozen=True)
class Line:
    """A named line through points."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """Lines over one pair of axes."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]


def draw_panels(panels: Sequence[Panel], columns: int | None = None) -> Image.Image:
    """Draw panels side by side, or in rows of some columns."""
    columns = columns or len(panels)
    image = Image.new("RGB", (WIDTH * columns, HEIGHT * -(-len(panels) // columns)), "white")
    for k, panel in enumerate(panels):
        tile = Image.new("RGB", (WIDTH, HEIGHT), "white")
        _draw(panel, tile)
        image.paste(tile, (k % columns * WIDTH, k // columns * HEIGHT))
    return image


def _draw(panel: Panel, image: Image.Image) -> None:
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    xs, ys = zip(*(point for line in panel.lines for point in line.points), strict=True)
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * (right - LEFT), bottom - (y - y0) / (y1 - y0) * (bottom - TOP)

    pen.text((WIDTH / 2, 12), panel.title, "black", ImageFont.load_default(15), anchor="mt")
    pen.text(((LEFT + right) / 2, HEIGHT - 10), panel.x, "black", font, anchor="mb")
    pen.text((8, TOP - 6), panel.y, "black", font, anchor="lb")
    for k in range(TICKS + 1):
        x, y = x0 + k / TICKS * (x1 - x0), y0 + k / TICKS * (y1 - y0)
        across, down = place(x, y)
        pen.line([(LEFT, down), (right, down)], "#e4e4e4")
        pen.text((LEFT - 8, down), f"{y:.3g}", "black", font, anchor="rm")
        pen.text((across, bottom + 8), f"{x:.3g}", "black", font, anchor="mt")
    pen.line([(LEFT, TOP), (LEFT, bottom), (right, bottom)], "black")
    for k, line in enumerate(panel.lines):
        colour = COLOURS[k % len(COLOURS)]
        points = [place(*point) for point in line.points]
        pen.line(points, colour, width=2, joint="curve")
        for x, y in points:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        pen.text((LEFT + 12, TOP + 8 + 17 * k), line.name, colour, font)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A range with a margin on top, never empty."""
    low, high = min(values), max(values)
    return low, high + 0.08 * (high - low) if high > low else low + 1.0
