"""Training data of which the frozen models' part is done: moments of latents, and embeddings of captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Required, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from sdmodule.data.cache.tensor_store import TensorStore
from sdmodule.data.toy.dataset import View
from sdmodule.io.fingerprint import fingerprint

FORM = "cover, bicubic, centre, 1"
"""How images are brought to their size; another number makes all cached moments anew."""


class ImageDataset(Protocol):
    """Captioned images that can be cached.

    Attributes:
        center_crop: whether the part of an image that is shown is always the same.
        random_flip: whether images are mirrored at times.
    """

    center_crop: bool
    random_flip: bool

    @property
    def fixed_captions(self) -> bool:
        """Whether an image has the same caption each time."""
        ...

    def __len__(self) -> int: ...

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that an image is shown in."""
        ...

    def content(self, index: int) -> str:
        """Names what an image shows; another name, another image."""
        ...

    def caption(self, index: int) -> str:
        """What an image is said to show."""
        ...

    def view(self, index: int) -> View:
        """How an image is shown in this epoch."""
        ...

    def seen(self, index: int, view: View) -> dict[str, Tensor]:
        """An image as it is shown, ``image`` ``[3, H, W]`` in [-1, 1]."""
        ...


class CaptionedMoments(TypedDict, total=False):
    """One training example: ``moments`` is mean and standard deviation of the latents, ``[8, h, w]``.

    For inpainting the image stands beside them, since each step masks and encodes it in another way; for a ControlNet
    its control image does, and for a masked loss its mask.
    """

    moments: Required[Tensor]
    caption: Required[str]
    image: Tensor
    mask: Tensor
    conditioning: Tensor


def moments_keys(content: str, size: tuple[int, int], random_flip: bool) -> list[str]:
    """The keys of an image's moments: as it is, and, if it is mirrored at times, mirrored."""
    return [fingerprint(content, size, FORM, mirrored) for mirrored in ([False, True] if random_flip else [False])]


class CachedMomentsDataset(Dataset[CaptionedMoments]):
    """Images whose moments are on disk, read as they are needed.

    Args:
        images: the images, which say how each is shown.
        store: where the moments are.
        keys: for each image the keys of `moments_keys`.
        with_images: give the image beside its moments.
    """

    def __init__(
        self, images: ImageDataset, store: TensorStore, keys: Sequence[Sequence[str]], with_images: bool = False
    ) -> None:
        self.images = images
        self.store = store
        self.keys = keys
        self.with_images = with_images

    def __len__(self) -> int:
        return len(self.keys)

    def set_epoch(self, epoch: int) -> None:
        """Mirror other images from now on."""
        if hasattr(self.images, "set_epoch"):
            self.images.set_epoch(epoch)

    @override
    def __getitem__(self, index: int) -> CaptionedMoments:
        view = self.images.view(index)
        example = self.images.seen(index, view) if self.with_images else {}
        moments = self.store[self.keys[index][view.mirrored]]
        return cast(CaptionedMoments, {**example, "moments": moments, "caption": self.images.caption(index)})


class CachedEmbeddings:
    """Embeddings of captions, and of the empty one, each by the prompt that `literal` makes of it.

    Args:
        store: where they are, each ``[chunks * 77, D]`` of as many chunks as its prompt needs.
    """

    def __init__(self, store: TensorStore) -> None:
        self.store = store

    def __contains__(self, prompt: str) -> bool:
        return fingerprint(prompt) in self.store

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts, ``[B, chunks * 77, D]``: short ones are filled up with chunks of the empty one."""
        rows = [self.store[fingerprint(prompt)] for prompt in prompts]
        empty = self.store[fingerprint("")]
        longest = max(map(len, rows))
        return torch.stack([torch.cat([row, empty.repeat((longest - len(row)) // len(empty), 1)]) for row in rows])
