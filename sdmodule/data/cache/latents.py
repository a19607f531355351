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
"""How pictures are brought to their size; another number makes all cached moments anew."""


class Pictures(Protocol):
    """Captioned pictures that can be cached.

    Attributes:
        center_crop: whether the part of a picture that is shown is always the same.
        random_flip: whether pictures are mirrored at times.
    """

    center_crop: bool
    random_flip: bool

    @property
    def fixed_captions(self) -> bool:
        """Whether a picture has the same caption each time."""
        ...

    def __len__(self) -> int: ...

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that a picture is shown in."""
        ...

    def content(self, index: int) -> str:
        """Names what a picture shows; another name, another picture."""
        ...

    def caption(self, index: int) -> str:
        """What a picture is said to show."""
        ...

    def view(self, index: int) -> View:
        """How a picture is shown in this epoch."""
        ...

    def seen(self, index: int, view: View) -> dict[str, Tensor]:
        """A picture as it is shown, ``image`` ``[3, H, W]`` in [-1, 1]."""
        ...


class CaptionedMoments(TypedDict, total=False):
    """One training example: ``moments`` is mean and standard deviation of the latents, ``[8, h, w]``.

    For inpainting the picture stands beside them, since each step masks and encodes it in another way; for a ControlNet
    its control picture does, and for a masked loss its mask.
    """

    moments: Required[Tensor]
    caption: Required[str]
    image: Tensor
    mask: Tensor
    conditioning: Tensor


def picture_keys(content: str, size: tuple[int, int], random_flip: bool) -> list[str]:
    """The keys of a picture's moments: as it is, and, if it is mirrored at times, mirrored."""
    return [fingerprint(content, size, FORM, mirrored) for mirrored in ([False, True] if random_flip else [False])]


class CachedPictures(Dataset[CaptionedMoments]):
    """Pictures whose moments are on disk, read as they are needed.

    Args:
        pictures: the pictures, which say how each is shown.
        store: where the moments are.
        keys: for each picture the keys of `picture_keys`.
        with_pictures: give the picture beside its moments.
    """

    def __init__(
        self, pictures: Pictures, store: TensorStore, keys: Sequence[Sequence[str]], with_pictures: bool = False
    ) -> None:
        self.pictures = pictures
        self.store = store
        self.keys = keys
        self.with_pictures = with_pictures

    def __len__(self) -> int:
        return len(self.keys)

    def set_epoch(self, epoch: int) -> None:
        """Mirror other pictures from now on."""
        if hasattr(self.pictures, "set_epoch"):
            self.pictures.set_epoch(epoch)

    @override
    def __getitem__(self, index: int) -> CaptionedMoments:
        view = self.pictures.view(index)
        example = self.pictures.seen(index, view) if self.with_pictures else {}
        moments = self.store[self.keys[index][view.mirrored]]
        return cast(CaptionedMoments, {**example, "moments": moments, "caption": self.pictures.caption(index)})


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
