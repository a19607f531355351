"""Data sets whose frozen part is precomputed: moments of latents, and embeddings of captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Required, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from sdmodule.data.cache.tensor_store import TensorStore
from sdmodule.data.dataset import Crop
from sdmodule.data.example import View
from sdmodule.families.conditioning import Conditioning
from sdmodule.io.fingerprint import fingerprint

FORM = "cover, bicubic, centre, 1"
"""How images are resized; part of every key, so a new number at the end recomputes all cached moments."""

POOLED = "pooled"
"""Part of the key of a prompt's pooled embedding."""


class ImageDataset(Protocol):
    """A data set of captioned images whose latents can be cached.

    Attributes:
        center_crop: whether the crop of an image is always the same.
        random_flip: whether images are flipped at random.
    """

    center_crop: bool
    random_flip: bool

    @property
    def fixed_captions(self) -> bool:
        """Whether an image has the same caption in every epoch."""
        ...

    def __len__(self) -> int: ...

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of an image as the model sees it."""
        ...

    def original_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image before it is resized and cropped."""
        ...

    def content(self, index: int) -> str:
        """A key of an image's content; it changes when the image does."""
        ...

    def caption(self, index: int) -> str:
        """The caption of an image."""
        ...

    def view(self, index: int) -> View:
        """The view of an image in this epoch."""
        ...

    def load(self, index: int, view: View) -> dict[str, Tensor]:
        """The tensors of an image in a view; ``image`` is ``[3, H, W]`` in [-1, 1]."""
        ...


class CaptionedMoments(TypedDict, total=False):
    """One training example: ``moments`` is mean and standard deviation of the latents, ``[8, h, w]``.

    The other entries are those of `CaptionedImage`. They are there for inpainting, which masks and encodes the image
    again at every step, for a ControlNet, and for a masked loss.
    """

    moments: Required[Tensor]
    caption: Required[str]
    original_size: Required[Tensor]
    crop_top_left: Required[Tensor]
    image: Tensor
    mask: Tensor
    conditioning: Tensor


def moments_keys(content: str, size: tuple[int, int], random_flip: bool) -> list[str]:
    """The store's keys of an image's moments: as it is and, with ``random_flip``, flipped."""
    return [fingerprint(content, size, FORM, flipped) for flipped in ([False, True] if random_flip else [False])]


class CachedMomentsDataset(Dataset[CaptionedMoments]):
    """Images whose moments are read from disk when they are needed.

    Args:
        images: the images, which choose the view of each epoch.
        store: the moments.
        keys: the keys of each image, from `moments_keys`, as bytes, ``[N, flips, 16]``.
        original_sizes: height and width of each image before it was resized and cropped, ``[N, 2]``.
        with_images: return the image beside its moments.
    """

    def __init__(
        self,
        images: ImageDataset,
        store: TensorStore,
        keys: NDArray[np.uint8],
        original_sizes: NDArray[np.int32],
        with_images: bool = False,
    ) -> None:
        self.images = images
        self.store = store
        self.keys = keys
        self.original_sizes = original_sizes
        self.with_images = with_images

    def __len__(self) -> int:
        return len(self.keys)

    def set_epoch(self, epoch: int) -> None:
        """Draw new flips."""
        if hasattr(self.images, "set_epoch"):
            self.images.set_epoch(epoch)

    @override
    def __getitem__(self, index: int) -> CaptionedMoments:
        view = self.images.view(index)
        example = self.images.load(index, view) if self.with_images else {}
        height, width = self.original_sizes[index].tolist()
        sizes = Crop((width, height), self.images.size_of(index), view).sizes()
        moments = self.store[self.keys[index, int(view.flipped)].tobytes().hex()]
        return cast(CaptionedMoments, {**example, **sizes, "moments": moments, "caption": self.images.caption(index)})


class CachedEmbeddings:
    """Text embeddings of all captions and of the empty prompt, looked up by prompt.

    Args:
        store: the hidden states of each prompt, ``[chunks * 77, D]`` with as many chunks as it needs, and its pooled
            embedding ``[P]`` if the model uses it; see `entries`.
    """

    def __init__(self, store: TensorStore) -> None:
        self.store = store

    def __contains__(self, prompt: str) -> bool:
        return fingerprint(prompt) in self.store

    @staticmethod
    def entries(prompt: str, hidden_states: Tensor, pooled: Tensor | None) -> dict[str, Tensor]:
        """What the store holds of a prompt."""
        own = {fingerprint(prompt): hidden_states}
        return own if pooled is None else own | {fingerprint(prompt, POOLED): pooled}

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of B prompts; short ones are padded with the empty prompt's."""
        rows = [self.store[fingerprint(prompt)] for prompt in prompts]
        empty = self.store[fingerprint("")]
        longest = max(map(len, rows))
        padded = [torch.cat([row, empty.repeat((longest - len(row)) // len(empty), 1)]) for row in rows]
        pooled = None
        if fingerprint("", POOLED) in self.store:
            pooled = torch.stack([self.store[fingerprint(prompt, POOLED)] for prompt in prompts])
        return Conditioning(torch.stack(padded), pooled)
