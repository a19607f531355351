"""What a batch of training or validation must hold, checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sdmodule.errors import SettingsError

RANGES = {"image": (-1.0, 1.0), "conditioning": (0.0, 1.0), "mask": (0.0, 1.0)}
"""Values that the tensors of a batch may have."""

TOLERANCE = 1e-3
"""What rounding may add to them."""

CONTRACT = (
    "a batch is a mapping with image, a float tensor [B, 3, H, W] in [-1, 1], and caption, a list of B texts, or the "
    "pair of both"
)


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
