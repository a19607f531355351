"""Images and masks as people have them: files, PIL images, arrays, tensors, a box, an alpha channel."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw

from sdmodule.errors import SettingsError, choices
from sdmodule.io.image_files import FORMATS, open_upright

ALPHA = "alpha"
"""What stands for a mask where the image's own transparent part is meant."""


@dataclass
class MaskedImage:
    """An image and where it is repainted.

    Attributes:
        image: RGB.
        mask: of the same size, mode L, with nothing but 255, repaint, and 0, keep.
    """

    image: Image.Image
    mask: Image.Image


def pair_images_and_masks(images: Any, masks: Any, count: int) -> list[MaskedImage]:
    """Read images and masks for ``count`` prompts: one for all of them, or one for each.

    Args:
        images: one image or a list: a path, a PIL image, an array ``[H, W, 3]`` or a tensor ``[3, H, W]``, of 0 to
            255 if of whole numbers and of 0 to 1 if not. A tensor or an array with one more dimension is a list.
        masks: likewise, but of one channel, more than half of white repainted; or a box ``[x0, y0, x1, y1]`` in
            pixels; or ``alpha``, for the transparent part of the image.
        count: number of prompts.

    Raises:
        SettingsError: for an image or a mask that cannot be used, or lists that do not match.
    """
    given_images, given_masks = _listed(images), _listed(masks)
    total = max(len(given_images), len(given_masks))
    for name, given in (("image", given_images), ("mask", given_masks)):
        if len(given) not in (1, total):
            raise SettingsError(f"{name} has {len(given)} entries for {total}; give one, or one for each of {total}.")
    if total not in (1, count):
        raise SettingsError(f"image has {total} entries for {count} prompts; give one image, or one a prompt.")
    read = [
        read_masked_image(
            given_images[k % len(given_images)], given_masks[k % len(given_masks)], k if total > 1 else None
        )
        for k in range(total)
    ]
    return read * (count // total)


def count_images(images: Any, masks: Any) -> int:
    """How many masked images `pair_images_and_masks` would make of these for one prompt or for as many."""
    return max(len(_listed(images)), len(_listed(masks)))


def read_masked_image(image: Any, mask: Any, position: int | None = None) -> MaskedImage:
    """Read an image and its mask; ``position`` is its place in a list, for messages. See `pair_images_and_masks`."""
    at = "" if position is None else f"[{position}]"
    source = read_image(image, f"image{at}")
    if mask is None:
        own = source.has_transparency_data
        hint = "for its transparent part give mask=alpha" if own else "give a mask, such as mask=[x0,y0,x1,y1]"
        raise SettingsError(f"image{at}{' with transparency' if own else ''} came without a mask; {hint}.")
    if isinstance(mask, str) and mask == ALPHA:
        if not source.has_transparency_data:
            raise SettingsError(
                f"mask{at}=alpha needs an image with transparency, and image{at} has none; give a mask."
            )
        hole = source.convert("RGBA").getchannel("A").point([255] * 128 + [0] * 128)
    elif _is_box(mask):
        hole = _box(mask, source.size, at)
    else:
        hole = read_image(mask, f"mask{at}").convert("L").point([0] * 128 + [255] * 128)
    if hole.size != source.size:
        raise SettingsError(
            f"mask{at} is of {_size(hole)} pixels and image{at} of {_size(source)}; give a mask of the image's size."
        )
    darkest, lightest = hole.getextrema()
    if not lightest:
        raise SettingsError(
            f"mask{at} is empty: nothing in it is white, so nothing would be repainted; paint it white."
        )
    if darkest:
        rank_zero_info(f"mask{at} covers the whole image: nothing of image{at} is kept.")
    return MaskedImage(source.convert("RGB"), hole)


def _listed(value: Any) -> list[Any]:
    if _is_box(value):
        return [value]
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4:
        return list(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(side, (int, float)) and not isinstance(side, bool) for side in value)
    )


def _box(box: Sequence[float], size: tuple[int, int], at: str) -> Image.Image:
    given = "[" + ",".join(str(side) for side in box) + "]"
    width, height = size
    if len(box) != 4 or any(side != int(side) for side in box):
        raise SettingsError(f"mask{at}={given} is no box; give four whole numbers [x0,y0,x1,y1].")
    x0, y0, x1, y1 = map(int, box)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise SettingsError(
            f"mask{at}={given} is no box within the image of {width}x{height} pixels; "
            "give [x0,y0,x1,y1] with 0 <= x0 < x1 and 0 <= y0 < y1, and at most the image's size."
        )
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), fill=255)
    return mask


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def read_image(value: Any, name: str) -> Image.Image:
    """A copy of an image in whatever form; the caller's own is never changed."""
    if isinstance(value, Image.Image):
        return value.copy()
    if isinstance(value, (str, Path)):
        path = Path(value).expanduser()
        if not os.path.isfile(path):
            raise SettingsError(f"{name}={value} was not found; give the path of an image.")
        try:
            return open_upright(path)
        except Exception as error:  # PIL's readers let many kinds through
            raise SettingsError(
                f"{name}={value} cannot be read as an image ({error}); give one of {choices(FORMATS)}."
            ) from error
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        value = (value.permute(1, 2, 0) if value.ndim == 3 else value).numpy()
    if isinstance(value, np.ndarray):
        return _from_array(value, name)
    raise SettingsError(f"{name} is of type {type(value).__name__}; give a path, a PIL image, an array or a tensor.")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    flat = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[-1] in (3, 4))):
        raise SettingsError(
            f"{name} has the shape {tuple(array.shape)}; give an array [H, W, 3] or a tensor [3, H, W], "
            "a mask with one channel or none."
        )
    if flat.dtype == bool:
        flat = flat.astype(np.uint8) * 255
    limit = 1.0 if flat.dtype.kind == "f" else 255
    if not (flat.min() >= 0 and flat.max() <= limit):
        raise SettingsError(
            f"{name} has values from {flat.min():g} to {flat.max():g}; give 0 to 1 for numbers with a fraction, "
            "0 to 255 for whole numbers."
        )
    return Image.fromarray((flat * 255).round().astype(np.uint8) if limit == 1.0 else flat.astype(np.uint8))
