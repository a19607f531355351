"""Small images and folders that the reported faults are shown on, drawn when they are needed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
BOX = (20, 20, 44, 44)


def ramp(number: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A ramp to the right and downwards; the number is its blue."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    levels = [x * 255 // max(1, size[0] - 1), y * 255 // max(1, size[1] - 1), np.full_like(x, 40 * number % 256)]
    return Image.fromarray(np.stack(levels, -1).astype(np.uint8))


def noise(side: int = SIDE) -> Image.Image:
    """An image that no format makes small, so that half of its file is half of its pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def strokes(ground: tuple[int, ...], ink: tuple[int, ...]) -> Image.Image:
    """A box of one colour on another, in LA, RGB or RGBA."""
    image = Image.new({2: "LA", 3: "RGB", 4: "RGBA"}[len(ground)], (SIDE, SIDE), ground)
    image.paste(ink, BOX)
    return image


def numbered(folder: Path, count: int) -> Path:
    """``p0.png``, ``p1.png``, …, each with its name as caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        captioned(folder / f"p{k}.png", ramp(k), f"p{k}")
    return folder


def captioned(file: Path, image: Image.Image, caption: str, **options: object) -> Path:
    """An image and the caption beside it."""
    image.save(file, **options)
    file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


def png(number: int) -> bytes:
    content = io.BytesIO()
    ramp(number).save(content, "PNG")
    return content.getvalue()


def shard(file: Path, *names: str, caption: str = "{}") -> Path:
    """A tar of ramps with captions; names may hold any bytes, as surrogates."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for k, name in enumerate(names):
            text = caption.format(k).encode()
            for member, content in ((f"{name}.png", png(k)), (f"{name}.txt", text)):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return file


def metadata(folder: Path, rows: list[dict[str, str]]) -> Path:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
