"""Image files: which formats are read, and what their pixels are."""

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
"""Formats that PIL may detect; some of its other readers start programs."""


class StoredImage(Protocol):
    """An image that is part of a larger file; ``str`` says where to find it."""

    def read(self) -> bytes:
        """The bytes of the image, as they would be in a file of its own."""
        ...


ImageFile = Path | StoredImage


def pil_source(image: ImageFile) -> Path | BytesIO:
    """What PIL opens an image from."""
    return image if isinstance(image, Path) else BytesIO(image.read())


@contextmanager
def open_image(path: ImageFile, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Open an image without reading its pixels.

    Raises:
        Exception: of many kinds, from PIL's readers; among them for more pixels than PIL's ``MAX_IMAGE_PIXELS``, 89
            million, since a small file may unpack to more than memory holds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        file = Image.open(pil_source(path), formats=formats)
    with file:
        yield file


def open_upright(path: ImageFile) -> Image.Image:
    """The first frame of an image in its own mode, rotated as EXIF says, with 16 bits scaled to 8.

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
    """Width and height of an image once rotated as EXIF says; its pixels are not read.

    Raises:
        Exception: of many kinds, as `open_upright` does.
    """
    with open_image(path) as file:
        width, height = file.size
        sideways = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if sideways else (width, height)
