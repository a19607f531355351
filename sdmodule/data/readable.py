"""Pictures of a folder as files: which of them can be read, and how their pixels come out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from sdmodule.data.captions import Example, some
from sdmodule.errors import SettingsError, choices
from sdmodule.picture_files import SUFFIXES, open_upright, opened


def keep_readable(examples: Sequence[Example], folder: Path, skip_bad: bool, key: str = "data.root") -> list[Example]:
    """Check the header of every picture; a file that PIL cannot read as a picture is an error, or is skipped.

    Args:
        examples: pictures of one folder.
        folder: that folder.
        skip_bad: leave the bad ones out with one warning that counts and names them.
        key: the setting that gave the folder, for the messages.

    Raises:
        SettingsError: if a picture is bad and ``skip_bad`` is false, or if none is good.
    """
    paths = dict.fromkeys(path for example in examples for path in (example.path, example.mask) if path is not None)
    problems = {path: problem for path in paths if (problem := _problem(path))}
    if not problems:
        return list(examples)
    bad = list(problems)
    if not skip_bad:
        raise SettingsError(
            f"{key}={folder} has {len(bad)} files that are no readable pictures: {some(bad, folder)} "
            f"({problems[bad[0]]}); replace them, or set data.skip_bad=true to leave them out."
        )
    good = [example for example in examples if not {example.path, example.mask} & problems.keys()]
    if not good:
        raise SettingsError(f"{key}={folder} has no readable picture left after skipping {some(bad, folder)}.")
    rank_zero_warn(f"{key}: skipped {len(bad)} unreadable pictures: {some(bad, folder, limit=20)}.")
    return good


def _problem(path: Path) -> str | None:
    """Say what is wrong with a picture's file, as far as its header and checksums tell."""
    if path.suffix.lower() not in SUFFIXES:
        return f"{path.suffix or 'no suffix'} is none of {choices(SUFFIXES)}"
    try:
        with opened(path) as image:
            if image.mode == "F":
                return "floating-point pixels have no fixed range"
            image.verify()
    except Exception as error:  # PIL's plugins let many kinds through: OSError, SyntaxError, struct.error, bomb errors
        return str(error)
    return None


def load_rgb(path: Path) -> Image.Image:
    """Read a picture as 8-bit RGB: upright, transparent parts on white, 16 bits scaled to 8, the first frame only.

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


def load_mask(path: Path, picture: Path, size: tuple[int, int]) -> Image.Image:
    """Read the mask of a picture of ``size`` as 8-bit grey.

    Raises:
        SettingsError: if its pixels cannot be decoded, or it has another size.
    """
    mask = load_rgb(path).convert("L")
    if mask.size != size:
        raise SettingsError(
            f"data: the mask {path} is of {mask.width}x{mask.height} pixels and {picture} of {size[0]}x{size[1]}; "
            "give a mask of the picture's size."
        )
    return mask
