"""Files of images: which kinds are read, and how their pixels come out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What PIL may take a file for; others of its readers start programs."""


class StoredImage(Protocol):
    """An image that is no file of its own but a part of one; as a text, what people find it by."""

    def read(self) -> bytes:
        """The bytes that its file would have."""
        ...


ImageFile = Path | StoredImage


def pil_source(image: ImageFile) -> Path | BytesIO:
    """An image as PIL opens it."""
    return image if isinstance(image, Path) else BytesIO(image.read())


@contextmanager
def open_image(path: ImageFile, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Open an image; its pixels are not read yet.

    Raises:
        Exception: of many kinds, from PIL's readers; one of them for more than PIL's ``MAX_IMAGE_PIXELS``, 89 million,
            which may be a small file that fills the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        file = Image.open(pil_source(path), formats=formats)
    with file:
        yield file


def open_upright(path: ImageFile) -> Image.Image:
    """Read an image's first frame, turned as its camera was held, 16 bits scaled to 8, in whatever mode it has.

    Raises:
        Exception: of many kinds, from PIL's readers, for a file whose pixels cannot be decoded.
    """
    with open_image(path) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image


def upright_size(path: ImageFile) -> tuple[int, int]:
    """Width and height of an image once it is upright; its pixels are not read.

    Raises:
        Exception: of many kinds, as `open_upright` does.
    """
    with open_image(path) as file:
        width, height = file.size
        sideways = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if sideways else (width, height)
