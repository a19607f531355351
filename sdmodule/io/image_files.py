"""Files of pictures: which kinds are read, and how their pixels come out."""

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


class StoredPicture(Protocol):
    """A picture that is no file of its own but a part of one; as a text, what people find it by."""

    def read(self) -> bytes:
        """The bytes that its file would have."""
        ...


PictureFile = Path | StoredPicture


def readable_by_pil(picture: PictureFile) -> Path | BytesIO:
    """A picture as PIL opens it."""
    return picture if isinstance(picture, Path) else BytesIO(picture.read())


@contextmanager
def opened(path: PictureFile, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Open a picture; its pixels are not read yet.

    Raises:
        Exception: of many kinds, from PIL's readers; one of them for more than PIL's ``MAX_IMAGE_PIXELS``, 89 million,
            which may be a small file that fills the memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        file = Image.open(readable_by_pil(path), formats=formats)
    with file:
        yield file


def open_upright(path: PictureFile) -> Image.Image:
    """Read a picture's first frame, turned as its camera was held, 16 bits scaled to 8, in whatever mode it has.

    Raises:
        Exception: of many kinds, from PIL's readers, for a file whose pixels cannot be decoded.
    """
    with opened(path) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image


def upright_size(path: PictureFile) -> tuple[int, int]:
    """Width and height of a picture once it is upright; its pixels are not read.

    Raises:
        Exception: of many kinds, as `open_upright` does.
    """
    with opened(path) as file:
        width, height = file.size
        sideways = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if sideways else (width, height)
