"""Read images and masks from files, PIL images, arrays, tensors, boxes or an alpha channel."""

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

from sdmodule.errors import SettingsError, choices, is_int, is_number
from sdmodule.io.image_files import FORMATS, SUFFIXES, open_upright, upright
from sdmodule.io.transparency import mask_levels, on_white

ALPHA = "alpha"
"""Value of ``mask`` that stands for the transparent part of the image."""


@dataclass
class MaskedImage:
    """An image and the mask of what is inpainted.

    Attributes:
        image: RGB, or RGBA for a photo with transparency, which is kept outside the mask.
        mask: of the same size, mode L: 255 is inpainted, 0 is kept, and nothing else occurs.
    """

    image: Image.Image
    mask: Image.Image


def pair_images_and_masks(images: Any, masks: Any, count: int) -> list[MaskedImage]:
    """Read images and masks for ``count`` prompts: one for all of them, or one for each.

    Args:
        images: one image or a list: a path, a PIL image, an array ``[H, W, 3]`` or a tensor ``[3, H, W]``. Integers
            range from 0 to 255, floats from 0 to 1, or from -1 to 1 if some are negative. A batched tensor or array is
            a list, and so are the images of a folder, sorted by name.
        masks: likewise with one channel, inpainted where it is above half of white; or a box ``[x0, y0, x1, y1]`` in
            pixels; or ``alpha``, for the transparent part of the image.
        count: number of prompts.

    Raises:
        SettingsError: for an image or a mask that cannot be used, or lists of different lengths.
    """
    image_list, mask_list = as_list(images, "image"), as_list(masks, "mask")
    _check_names(image_list, mask_list)
    total = max(len(image_list), len(mask_list))
    for name, values in (("image", image_list), ("mask", mask_list)):
        if len(values) not in (1, total):
            other = "mask" if name == "image" else "image"
            raise SettingsError(f"{name}: {len(values)} entries for {total} of {other}; give one, or one for each.")
    if total not in (1, count):
        raise SettingsError(f"image: {total} entries for {count} prompts; give one image, or one per prompt.")
    pairs = [
        read_masked_image(image_list[k % len(image_list)], mask_list[k % len(mask_list)], k if total > 1 else None)
        for k in range(total)
    ]
    return pairs * (count // total)


def _check_names(images: Sequence[Any], masks: Sequence[Any]) -> None:
    """Check that the files of two folders are paired by name."""
    if not all(isinstance(one, Path) for one in (*images, *masks)) or 1 in (len(images), len(masks)):
        return
    names, others = ({one.stem for one in files} for files in (images, masks))
    if lone := sorted(names ^ others):
        raise SettingsError(
            f"image, mask: {choices(lone[:3])} is in one of the folders only; name each mask as its image."
        )


def read_images(images: Any, count: int) -> list[Image.Image | torch.Tensor]:
    """Read images for ``count`` prompts, on white where they are transparent: one for all of them, or one for each.

    Args:
        images: see `pair_images_and_masks`; a tensor ``[4, h, w]``, or a batch of them, is taken for latents.
        count: number of prompts.

    Raises:
        SettingsError: for an image that cannot be used, or another number of images.
    """
    given = as_list(images, "image")
    if len(given) not in (1, count):
        raise SettingsError(f"image: {len(given)} images for {count} prompts; give one image, or one per prompt.")
    read = [
        one if _is_latents(one) else on_white(read_image(one, f"image[{k}]" if len(given) > 1 else "image"))
        for k, one in enumerate(given)
    ]
    return read * (count // len(read))


def read_all(images: Any, name: str) -> list[Image.Image]:
    """Read one image, several, or those of a folder, on white where they are transparent.

    Raises:
        SettingsError: for an image that cannot be read.
    """
    given = as_list(images, name)
    return [on_white(read_image(one, f"{name}[{k}]" if len(given) > 1 else name)) for k, one in enumerate(given)]


def _is_latents(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[0] == 4


def count_images(images: Any, masks: Any) -> int:
    """Number of images that `pair_images_and_masks` reads, before it repeats a single one for every prompt."""
    return max(len(as_list(images, "image")), len(as_list(masks, "mask")))


def read_masked_image(image: Any, mask: Any, position: int | None = None) -> MaskedImage:
    """Read an image and its mask, see `pair_images_and_masks`; ``position`` is the index in a list, for messages."""
    at = "" if position is None else f"[{position}]"
    source = read_image(image, f"image{at}")
    if mask is None:
        alpha = ", or mask=alpha for the transparent part of the image" if source.has_transparency_data else ""
        raise SettingsError(f"mask{at}: missing; give one for image{at}, such as mask=[x0,y0,x1,y1]{alpha}.")
    if isinstance(mask, str) and mask == ALPHA:
        if not source.has_transparency_data:
            raise SettingsError(f"mask{at}=alpha: image{at} has no transparency; give a mask.")
        area = source.convert("RGBA").getchannel("A").point([255] * 128 + [0] * 128)
    elif _is_box(mask):
        area = _draw_box(mask, source.size, at)
    else:
        area = mask_levels(read_image(mask, f"mask{at}")).point([0] * 128 + [255] * 128)
    if area.size != source.size:
        raise SettingsError(
            f"mask{at}: is {_size(area)} pixels and image{at} is {_size(source)}; give a mask of the image's size."
        )
    darkest, lightest = area.getextrema()
    if not lightest:
        raise SettingsError(f"mask{at}: is empty, with nothing white in it; paint the area to inpaint white.")
    if darkest:
        rank_zero_info(f"mask{at} covers the whole image: nothing of image{at} is kept.")
    return MaskedImage(source.convert("RGBA" if source.has_transparency_data else "RGB"), area)


def as_list(value: Any, name: str) -> list[Any]:
    """The images or masks of a list, a folder, or a batched array or tensor; one alone as a list of one.

    Args:
        value: what was given.
        name: the setting that it is from, for messages.

    Raises:
        SettingsError: for a folder without images.
    """
    if isinstance(value, (str, Path)) and os.path.isdir(folder := Path(value).expanduser()):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise SettingsError(f"{name}={value}: contains no images; images end in {choices(SUFFIXES)}.")
        return files
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
        and all(is_int(side) or isinstance(side, float) for side in value)
    )


def _draw_box(box: Sequence[float], size: tuple[int, int], at: str) -> Image.Image:
    given = "[" + ",".join(str(side) for side in box) + "]"
    width, height = size
    if len(box) != 4 or not all(is_number(side) and side == int(side) for side in box):
        raise SettingsError(f"mask{at}={given}: must be four whole numbers [x0,y0,x1,y1].")
    x0, y0, x1, y1 = map(int, box)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise SettingsError(
            f"mask{at}={given}: must be a box within the image of {width}x{height} pixels; "
            f"give [x0,y0,x1,y1] with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}."
        )
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), fill=255)
    return mask


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def read_image(value: Any, name: str) -> Image.Image:
    """Read an image of any form into a new PIL image.

    Args:
        value: a path, a PIL image, an array or a tensor, which stays unchanged.
        name: the setting that it is from, for messages.

    Raises:
        SettingsError: if it cannot be read.
    """
    if isinstance(value, Image.Image):
        return upright(value)
    if isinstance(value, (str, Path)):
        path = Path(value).expanduser()
        if not os.path.isfile(path):
            raise SettingsError(f"{name}={value}: not found; give the path of an image.")
        try:
            return open_upright(path)
        except Exception as error:  # PIL's readers raise many kinds
            raise SettingsError(
                f"{name}={value}: cannot be read as an image ({error}); give one of {choices(FORMATS)}."
            ) from error
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        value = (value.permute(1, 2, 0) if value.ndim == 3 else value).numpy()
    if isinstance(value, np.ndarray):
        return _from_array(value, name)
    raise SettingsError(f"{name}: is of type {type(value).__name__}; give a path, a PIL image, an array or a tensor.")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))):
        raise SettingsError(
            f"{name}: has the shape {tuple(array.shape)}; give an array [H, W, 3] or a tensor [3, H, W], "
            "or for a mask one channel or none."
        )
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    limit = 1.0 if pixels.dtype.kind == "f" else 255
    if limit == 1.0 and -1 <= pixels.min() < 0 and pixels.max() <= 1:  # as the model itself has them
        pixels = pixels / 2 + 0.5
    if not (pixels.min() >= 0 and pixels.max() <= limit):
        raise SettingsError(
            f"{name}: has values from {pixels.min():g} to {pixels.max():g}; floats must be 0 to 1 or -1 to 1, integers "
            "0 to 255."
        )
    return Image.fromarray((pixels * 255).round().astype(np.uint8) if limit == 1.0 else pixels.astype(np.uint8))
