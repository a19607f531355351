"""What Stable Diffusion XL is told of an image's size: by default, an image that was neither scaled nor cropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sdmodule.errors import SettingsError, is_int
from sdmodule.families.conditioning import ImageSizes

LARGEST_TOLD = 16384
"""Largest size in pixels that a denoiser is told; training images are smaller by far."""

Size = tuple[int, int]


@dataclass(frozen=True)
class SizeConditions:
    """The six micro-conditions of Podell et al. 2023, section 2.2; None stands for the default.

    Args:
        original_size: height and width of the training images that the sample is to look like; those of the sample.
        crop_top_left: rows and columns cut off there; ``(0, 0)`` puts the subject into the middle.
        target_size: height and width of the sample; its own.
        negative_original_size: the same for the negative prompt; as for the prompt, like the two below.
        negative_crop_top_left: rows and columns.
        negative_target_size: height and width.

    Raises:
        SettingsError: for anything but two whole numbers within bounds.
    """

    original_size: Size | None = None
    crop_top_left: Size | None = None
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crop_top_left: Size | None = None
    negative_target_size: Size | None = None

    def __post_init__(self) -> None:
        for name, pair in asdict(self).items():
            if pair is not None:
                object.__setattr__(self, name, _checked(name, pair, minimum=0 if "crop" in name else 1))

    @property
    def given(self) -> dict[str, list[int]]:
        """The conditions that differ from the default, in plain types."""
        return {name: list(pair) for name, pair in asdict(self).items() if pair is not None}

    def of_prompt(self, size: Size) -> ImageSizes:
        """What the denoiser is told with the prompt, for a sample of a height and width."""
        return ImageSizes(self.original_size or size, self.crop_top_left or (0, 0), self.target_size or size)

    def of_negative(self, size: Size) -> ImageSizes:
        """What it is told with the negative prompt."""
        usual = self.of_prompt(size)
        return ImageSizes(
            self.negative_original_size or usual.original,
            self.negative_crop_top_left or usual.crop,
            self.negative_target_size or usual.target,
            negative=True,
        )


def _checked(name: str, pair: Any, minimum: int) -> Size:
    whole = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 and all(map(is_int, pair))
    if not whole or not all(minimum <= side <= LARGEST_TOLD for side in pair):
        what = "rows and columns" if "crop" in name else "height and width"
        raise SettingsError(
            f"{name}={pair}: must be {what} in pixels, each from {minimum} to {LARGEST_TOLD}, such as [1024,1024]."
        )
    return pair[0], pair[1]
