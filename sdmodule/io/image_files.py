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

FORMAT_SUFFIXES = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c"),
    "AVIF": (".avif", ".avifs"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
FORMATS = tuple(FORMAT_SUFFIXES)
"""Formats that PIL may detect; some of its other readers start programs."""

SUFFIXES = frozenset(suffix for suffixes in FORMAT_SUFFIXES.values() for suffix in suffixes)

UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".svg", ".psd", ".xcf", ".exr", ".hdr", ".dds", ".eps", ".ico", ".icns"}
    | {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"}
)
"""Images of kinds that are not read; they are named, not left out silently."""


class StoredImage(Protocol):
    """An image that is part of a larger file; ``str`` says where to find it."""

    def read(self) -> bytes:
        """The bytes of the image, as they would be in a file of its own."""
        ...

    def identity(self) -> str:
        """What changes when the stored bytes may have changed, without reading them."""
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
        return upright(file)


def upright(image: Image.Image) -> Image.Image:
    """A new image of 8 bits: rotated as EXIF says, with 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image


def identity(image: ImageFile) -> str:
    """What changes when an image's bytes may have changed, without reading them: path, size and date of a file."""
    if not isinstance(image, Path):
        return image.identity()
    status = image.stat()
    return f"{image} {status.st_size} {status.st_mtime_ns}"


def upright_size(path: ImageFile) -> tuple[int, int]:
    """Width and height of an image once rotated as EXIF says; its pixels are not read.

    Raises:
        Exception: of many kinds, as `open_upright` does.
    """
    with open_image(path) as file:
        return upright_size_of(file)


def upright_size_of(image: Image.Image) -> tuple[int, int]:
    """Width and height of an open image once rotated as EXIF says."""
    width, height = image.size
    sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if sideways else (width, height)
