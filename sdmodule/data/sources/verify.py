"""Images as files: which of those that a place has can be read, and how their pixels come out."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, UnidentifiedImageError

from sdmodule.data.sources.folder import Examples, some
from sdmodule.errors import SettingsError, choices
from sdmodule.io.image_files import FORMATS, SUFFIXES, ImageFile, open_image, open_upright


class Place(Protocol):
    """Where captioned images are; as a text, the setting that gave it and its value."""

    @property
    def key(self) -> str:
        """The setting."""
        ...

    def find(self) -> Examples:
        """All images, always in the same order, each with its caption.

        Raises:
            SettingsError: if there are none, or not all of them have a caption.
        """
        ...

    def called(self, image: ImageFile) -> str:
        """What an image is called there."""
        ...


def verify_images(examples: Examples, place: Place, skip_bad: bool) -> list[int]:
    """Check the header of every image; a file that PIL cannot read as an image is an error, or is left out.

    Args:
        examples: the images of one place.
        place: that place.
        skip_bad: leave the bad ones out with one warning that counts and names them.

    Returns:
        The numbers of the good ones.

    Raises:
        SettingsError: if an image is bad and ``skip_bad`` is false, or if none is good.
    """
    good: list[int] = []
    problems: dict[str, str] = {}
    for index in range(len(examples)):
        example = examples[index]
        bad = {place.called(file): problem for file in example.files if (problem := _problem(file))}
        problems |= bad
        if not bad:
            good.append(index)
    if not problems:
        return good
    if not skip_bad:
        raise SettingsError(
            f"{place} has {len(problems)} files that are no readable images: {some([*problems])} "
            f"({next(iter(problems.values()))}); replace them, or set data.skip_bad=true to leave them out."
        )
    if not good:
        raise SettingsError(f"{place} has no readable image left after skipping {some([*problems])}.")
    rank_zero_warn(f"{place.key}: skipped {len(problems)} unreadable images: {some([*problems], limit=20)}.")
    return good


def _problem(file: ImageFile) -> str | None:
    """Say what is wrong with an image's file, as far as its header and checksums tell."""
    if isinstance(file, Path) and file.suffix.lower() not in SUFFIXES:
        return f"{file.suffix or 'no suffix'} is none of {choices(SUFFIXES)}"
    try:
        with open_image(file) as image:
            if image.mode == "F":
                return "floating-point pixels have no fixed range"
            image.verify()
    except UnidentifiedImageError:  # whose own message is of the object in memory
        return f"none of {choices(FORMATS)}"
    except Exception as error:  # PIL's plugins let many kinds through: OSError, SyntaxError, struct.error, bomb errors
        return str(error)
    return None


def load_rgb(path: ImageFile) -> Image.Image:
    """Read an image as 8-bit RGB: upright, transparent parts on white, 16 bits scaled to 8, the first frame only.

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
    """Read what belongs to an image of ``size``, its mask or its control image, as 8-bit RGB.

    Raises:
        SettingsError: if its pixels cannot be decoded, or it has another size.
    """
    beside = load_rgb(path)
    if beside.size != size:
        raise SettingsError(
            f"data: the {what} {path} is of {beside.width}x{beside.height} pixels and {image} of "
            f"{size[0]}x{size[1]}; give a {what} of the image's size."
        )
    return beside
