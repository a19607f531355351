"""Reading images of any source: which files are readable, and what their pixels are."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, UnidentifiedImageError

from sdmodule.data.example import Examples
from sdmodule.data.sources.folder import some
from sdmodule.errors import SettingsError, choices
from sdmodule.io.image_files import FORMATS, SUFFIXES, ImageFile, open_image, open_upright


class ImageSource(Protocol):
    """Where captioned images are stored; ``str`` gives its setting as ``key=value``."""

    @property
    def key(self) -> str:
        """Name of the setting that gave it."""
        ...

    def find(self) -> Examples:
        """All images with their captions, always in the same order.

        Raises:
            SettingsError: if there are none, or one has no caption.
        """
        ...

    def name_of(self, image: ImageFile) -> str:
        """The name of an image within the source."""
        ...


def verify_images(examples: Examples, source: ImageSource, skip_bad: bool) -> list[int]:
    """Indices of the readable images; the header of every file is checked.

    Args:
        examples: the images of a source.
        source: the source.
        skip_bad: leave unreadable images out, with one warning that names them.

    Raises:
        SettingsError: if an image is unreadable and ``skip_bad`` is false, or if none is readable.
    """
    good: list[int] = []
    problems: dict[str, str] = {}
    for index in range(len(examples)):
        example = examples[index]
        bad = {source.name_of(file): problem for file in example.files if (problem := _problem(file))}
        problems |= bad
        if not bad:
            good.append(index)
    if not problems:
        return good
    if not skip_bad:
        raise SettingsError(
            f"{source}: unreadable images: {some([*problems])} ({next(iter(problems.values()))}); replace them, or set "
            "data.skip_bad=true to leave them out."
        )
    if not good:
        raise SettingsError(
            f"{source}: no readable image is left after skipping {some([*problems])}; give a source with some."
        )
    rank_zero_warn(f"{source.key}: skipped unreadable images: {some([*problems], limit=20)}.")
    return good


def _problem(file: ImageFile) -> str | None:
    """What is wrong with an image file, as far as its header and checksums tell."""
    if isinstance(file, Path) and file.suffix.lower() not in SUFFIXES:
        return f"{file.suffix or 'no suffix'} is not one of {choices(SUFFIXES)}"
    try:
        with open_image(file) as image:
            if image.mode == "F":
                return "floating-point pixels have no fixed range"
            image.verify()
    except UnidentifiedImageError:  # its own message names an object in memory
        return f"not one of {choices(FORMATS)}"
    except Exception as error:  # PIL's plugins raise many kinds: OSError, SyntaxError, struct.error, bomb errors
        return str(error)
    return None


def load_rgb(path: ImageFile) -> Image.Image:
    """An image as 8-bit RGB: upright, transparency on white, 16 bits scaled to 8, the first frame only.

    Raises:
        SettingsError: if its pixels cannot be decoded, or are more than PIL's limit.
    """
    try:
        image = open_upright(path)
    except Exception as error:
        raise SettingsError(f"data: {path} cannot be decoded ({error}); replace or remove it.") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_beside(path: ImageFile, image: ImageFile, size: tuple[int, int], what: str) -> Image.Image:
    """The mask or control image of an image, as 8-bit RGB.

    Args:
        path: its file.
        image: the file of the image that it belongs to, for the message.
        size: width and height of that image.
        what: what it is, for the message.

    Raises:
        SettingsError: if its pixels cannot be decoded, or its size differs from the image's.
    """
    beside = load_rgb(path)
    if beside.size != size:
        raise SettingsError(
            f"data: the {what} {path} has {beside.width}x{beside.height} pixels, but {image} has {size[0]}x{size[1]}; "
            f"give a {what} of the image's size."
        )
    return beside
