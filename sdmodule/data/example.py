"""One training example: its files and caption, the view of it that an epoch shows, and the tensors it becomes."""

from __future__ import annotations

import random
from typing import NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdmodule.io.image_files import ImageFile


class CaptionStyle(NamedTuple):
    """How training rewrites a caption: tags, the parts between commas, are shuffled, then a template is filled in.

    The first ``keep_tags`` tags stay in place; ``{}`` in a template is replaced by the caption. If there are several
    templates, one is drawn each time.
    """

    templates: tuple[str, ...] = ()
    shuffle_tags: bool = False
    keep_tags: int = 0

    def text(self, caption: str, rng: random.Random | None) -> str:
        """The caption in this style; without an ``rng``, tags stay in order and the first template is used."""
        if self.shuffle_tags and rng is not None:
            tags = [tag.strip() for tag in caption.split(",")]
            first, others = tags[: self.keep_tags], tags[self.keep_tags :]
            rng.shuffle(others)
            caption = ", ".join(first + others)
        if not self.templates:
            return caption
        template = self.templates[0] if rng is None or len(self.templates) == 1 else rng.choice(self.templates)
        return template.replace("{}", caption)


class Example(NamedTuple):
    """An image file with its caption and, if it has them, the files of its mask and its control image."""

    path: ImageFile
    caption: str
    mask: ImageFile | None = None
    style: CaptionStyle = CaptionStyle()
    control: ImageFile | None = None

    @property
    def files(self) -> list[ImageFile]:
        """All files of the example."""
        return [file for file in (self.path, self.mask, self.control) if file is not None]


class Examples(Protocol):
    """A sequence of examples, which may be read lazily."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@runtime_checkable
class IndexedExamples(Examples, Protocol):
    """Examples whose sizes and contents can be asked for."""

    def size(self, row: int) -> tuple[int, int]:
        """Width and height of an image, upright."""
        ...

    def sizes(self) -> NDArray[np.int32]:
        """Width and height of all images, upright, ``[N, 2]``."""
        ...

    def content(self, row: int) -> str:
        """The fingerprint of an image's bytes."""
        ...


class View(NamedTuple):
    """The crop of an image, as its position from 0 to 1 along each axis, and whether it is flipped."""

    x: float = 0.5
    y: float = 0.5
    flipped: bool = False


class CaptionedImage(TypedDict):
    """One training example: ``image`` is ``[3, H, W]`` in [-1, 1].

    ``original_size`` is its height and width before it was resized and cropped, and ``crop_top_left`` the rows and
    columns that the crop left off at the top and on the left, in pixels of the resized image; both are ``[2]``, int64.
    ``mask``, if any, is ``[1, H, W]`` of 0 and 1; ``conditioning``, the image for a ControlNet, ``[3, H, W]`` in
    [0, 1].
    """

    image: Tensor
    caption: str
    original_size: NotRequired[Tensor]
    crop_top_left: NotRequired[Tensor]
    mask: NotRequired[Tensor]
    conditioning: NotRequired[Tensor]
