"""What a batch of training or validation must hold, checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.families.conditioning import ImageSizes

RANGES = {"image": (-1.0, 1.0), "conditioning": (0.0, 1.0), "mask": (0.0, 1.0)}
"""Values that the tensors of a batch may have."""

TOLERANCE = 1e-3
"""What rounding may add to them."""

CONTRACT = (
    "a batch is a mapping with image, a float tensor [B, 3, H, W] in [-1, 1], and caption, a list of B texts, or the "
    "pair of both"
)


SMALL = ("original_size", "crop_top_left", "prior")
"""What of a batch is read on the host, and stays there."""


def read_batch(batch: Any, captions: bool = True, values: bool = True) -> dict[str, Any]:
    """A batch as a mapping; a pair is an image tensor and its captions.

    Args:
        batch: what a data loader gave.
        captions: whether it must hold captions.
        values: whether the range of its tensors is checked, not only their type.

    Raises:
        SettingsError: if it is something else, or its tensors have other types or values.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor):
        batch = {"image": batch[0], "caption": batch[1]}
    if isinstance(batch, Tensor) and not captions:
        batch = {"image": batch}
    if not isinstance(batch, Mapping):
        raise SettingsError(f"the data loader gave a {type(batch).__name__}; {CONTRACT}.")
    images = batch.get("image", batch.get("moments"))
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise SettingsError(f"the data loader gave a batch with {_described(batch)}; {CONTRACT}.")
    if captions:
        _check_captions(batch, len(images))
    for name, bounds in RANGES.items():
        if name in batch:
            _check_type(name, batch[name], *bounds)
            if values:
                _check_range(name, batch[name], *bounds)
    return dict(batch)


def image_sizes(batch: Mapping[str, Any], pixels_per_latent: int) -> list[ImageSizes]:
    """The sizes of the images of a batch; without ``original_size`` they were neither resized nor cropped.

    Args:
        batch: its ``original_size``, height and width, and ``crop_top_left``, rows and columns, are ``[B, 2]`` in
            pixels.
        pixels_per_latent: downsampling factor of the VAE.

    Raises:
        SettingsError: for sizes of another shape or below 1, and crops below 0.
    """
    images, factor = (batch["image"], 1) if "image" in batch else (batch["moments"], pixels_per_latent)
    count, height, width = len(images), images.shape[-2] * factor, images.shape[-1] * factor
    originals = _rows("original_size", batch.get("original_size", [[height, width]] * count), count, 1)
    crops = _rows("crop_top_left", batch.get("crop_top_left", [[0, 0]] * count), count, 0)
    return [ImageSizes(original, crop, (height, width)) for original, crop in zip(originals, crops, strict=True)]


def _rows(name: str, values: Any, count: int, lowest: int) -> list[tuple[int, int]]:
    """Pairs of whole numbers, one for each image of a batch."""
    rows = values.tolist() if isinstance(values, Tensor) else values
    try:
        pairs = [(int(first), int(second)) for first, second in rows]
    except (TypeError, ValueError):
        pairs = []
    if len(pairs) != count or min(min(pair) for pair in pairs) < lowest:
        raise SettingsError(
            f"the data loader gave {name}={rows} for {count} images; give a tensor [B, 2] of whole numbers of at least "
            f"{lowest}, in pixels."
        )
    return pairs


def _described(batch: Mapping[str, Any]) -> str:
    forms = (f"{name} {list(value.shape)}" if isinstance(value, Tensor) else name for name, value in batch.items())
    return ", ".join(map(str, forms)) or "nothing"


def _check_captions(batch: Mapping[str, Any], count: int) -> None:
    texts = batch.get("caption")
    listed = isinstance(texts, Sequence) and not isinstance(texts, str) and all(isinstance(text, str) for text in texts)
    if texts is None or not listed:
        found = "no caption" if texts is None else f"a caption of type {type(texts).__name__}"
        raise SettingsError(f"the data loader gave a batch with {found}; {CONTRACT}.")
    if len(texts) != count:
        raise SettingsError(f"the data loader gave {len(texts)} captions for {count} images; {CONTRACT}.")


def _check_type(name: str, values: Tensor, lowest: float, highest: float) -> None:
    if not values.is_floating_point():
        raise SettingsError(
            f"the data loader gave {name} as {str(values.dtype).removeprefix('torch.')}; give floats from "
            f"{lowest:g} to {highest:g}, such as image / 127.5 - 1."
        )
    if not values.numel():
        raise SettingsError(f"the data loader gave {name} of the shape {list(values.shape)}; {CONTRACT}.")


def _check_range(name: str, values: Tensor, lowest: float, highest: float) -> None:
    """Check the values of a tensor; NaNs fail too."""
    low, high = (float(value) for value in values.aminmax())
    if not (lowest - TOLERANCE <= low and high <= highest + TOLERANCE):
        raise SettingsError(
            f"the data loader gave {name} with values from {low:g} to {high:g}; they must be from {lowest:g} to "
            f"{highest:g}."
        )
