"""Reading images of any source: which files are readable, and what their pixels are."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, UnidentifiedImageError

from sdmodule.data.example import Example, Examples
from sdmodule.data.sources.folder import some
from sdmodule.data.sources.verified_files import VerifiedFiles
from sdmodule.errors import SettingsError, choices, count_of
from sdmodule.io.image_files import FORMATS, SUFFIXES, ImageFile, open_image, open_upright
from sdmodule.io.progress import LONG_TASK, progress
from sdmodule.io.transparency import on_white


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
    """Indices of the images that can be decoded, their masks and control images too.

    Every file is decoded once; `VerifiedFiles` remembers which were good.

    Args:
        examples: the images of a source.
        source: the source.
        skip_bad: leave unreadable images out, with one warning that names them and says why.

    Raises:
        SettingsError: if an image is unreadable and ``skip_bad`` is false, or if none is readable.
    """
    verified = VerifiedFiles(str(source))
    count = len(examples)
    with (
        progress(count, f"{source.key}: checking images, once", delay=LONG_TASK) as on_done,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        found = []
        for problems in pool.map(lambda index: _problems(examples[index], source, verified), range(count)):
            found.append(problems)
            on_done(1)
    verified.save()
    good = [index for index, problems in enumerate(found) if not problems]
    problems = {name: problem for one in found for name, problem in one.items()}
    if not problems:
        return good
    told = [f"{name} ({problem})" for name, problem in problems.items()]
    if not skip_bad:
        raise SettingsError(
            f"{source}: {count_of(len(problems), 'unreadable image')}: {some(told)}; replace them, or set "
            "data.skip_bad=true to leave them out."
        )
    if not good:
        raise SettingsError(
            f"{source}: no readable image is left after skipping {some(told)}; give a source with some."
        )
    rank_zero_warn(f"{source.key}: skipped {count_of(len(problems), 'unreadable image')}: {some(told, limit=20)}.")
    return good


def _problems(example: Example, source: ImageSource, verified: VerifiedFiles) -> dict[str, str]:
    """What is wrong with each file of an example that cannot be used."""
    found = {source.name_of(file): _problem(file, verified) for file in example.files}
    return {name: problem for name, problem in found.items() if problem is not None}


def _problem(file: ImageFile, verified: VerifiedFiles) -> str | None:
    """What is wrong with an image file; it is decoded unless it is known to be good."""
    if isinstance(file, Path) and file.suffix.lower() not in SUFFIXES:
        return f"{file.suffix or 'no suffix'} is not one of {choices(SUFFIXES)}"
    try:
        with verified.checking(file) as known:
            if not known:
                with open_image(file) as image:
                    if image.mode == "F":
                        raise ValueError("floating-point pixels have no fixed range")
                    image.load()
    except UnidentifiedImageError:  # its own message names an object in memory
        return f"not one of {choices(FORMATS)}"
    except Exception as error:  # PIL's plugins raise many kinds: OSError, SyntaxError, struct.error, bomb errors
        return str(error)
    return None


def load_image(path: ImageFile) -> Image.Image:
    """An image of 8 bits in its own mode: upright, 16 bits scaled to 8, the first frame only.

    Raises:
        SettingsError: if its pixels cannot be decoded, or are more than PIL's limit.
    """
    try:
        return open_upright(path)
    except MemoryError as error:
        raise SettingsError(f"data: {path} is too large for the memory; make it smaller, or remove it.") from error
    except Exception as error:
        raise SettingsError(f"data: {path} cannot be decoded ({error}); replace or remove it.") from error


def load_rgb(path: ImageFile) -> Image.Image:
    """An image as 8-bit RGB, transparency on white; see `load_image`."""
    return on_white(load_image(path))


def load_beside(path: ImageFile, image: ImageFile, size: tuple[int, int], what: str) -> Image.Image:
    """The mask or control image of an image, in its own mode.

    Args:
        path: its file.
        image: the file of the image that it belongs to, for the message.
        size: width and height of that image.
        what: what it is, for the message.

    Raises:
        SettingsError: if its pixels cannot be decoded, or its size differs from the image's.
    """
    beside = load_image(path)
    if beside.size != size:
        raise SettingsError(
            f"data: the {what} {path} has {beside.width}x{beside.height} pixels, but {image} has {size[0]}x{size[1]}; "
            f"give a {what} of the image's size."
        )
    return beside
