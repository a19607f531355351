"""What a denoiser is conditioned on, as one value that every family fills as far as it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdmodule.diffusion.upload import upload


@dataclass(frozen=True)
class ImageSizes:
    """What a denoiser is told of the size of one image (Podell et al. 2023, section 2.2), in pixels.

    Attributes:
        original: height and width before it was scaled and cropped.
        crop: rows and columns that the crop left off at the top and on the left.
        target: height and width of the image that the denoiser sees.
        negative: whether this is told with a negative prompt.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]
    negative: bool = False


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser of B images is conditioned on beside the timestep.

    Attributes:
        hidden_states: of the text, ``[B, L, D]``.
        pooled: embedding of each whole prompt, ``[B, P]``; None where the denoiser takes none.
        images: embeddings of images that an IP-Adapter attends to, ``[B, N, D]`` or ``[B, N, tokens, D]``; likewise.
        time_ids: original size, crop and target size of each image in pixels, ``[B, 6]`` in float32; None likewise.
    """

    hidden_states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    images: Tensor | None = None

    @classmethod
    def of(cls, text: Conditioning | Tensor) -> Conditioning:
        """A conditioning as it is, or that of hidden states ``[B, L, D]`` alone."""
        return cls(text) if isinstance(text, Tensor) else text

    def __len__(self) -> int:
        """B."""
        return len(self.hidden_states)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Conditioning:
        """These rows, in this order."""
        beside = {"pooled": self.pooled, "time_ids": self.time_ids, "images": self.images}
        chosen = {name: None if value is None else value[rows] for name, value in beside.items()}
        return Conditioning(self.hidden_states[rows], **chosen)

    def followed_by(self, other: Conditioning) -> Conditioning:
        """The rows of both; neither has sizes yet."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat([self.pooled, other.pooled])
        return Conditioning(torch.cat([self.hidden_states, other.hidden_states]), pooled)

    def with_time_ids(self, time_ids: Tensor | None) -> Conditioning:
        """The same with the sizes of each image, if any."""
        return self if time_ids is None else replace(self, time_ids=upload(time_ids, self.hidden_states.device))

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The text as ``dtype``; sizes stay in float32, since 16 bits would round them."""
        return self._with_text(lambda text: text.to(dtype))

    def on(self, device: torch.device) -> Conditioning:
        """All of it on a device."""
        sizes = None if self.time_ids is None else self.time_ids.to(device)
        return replace(self._with_text(lambda text: text.to(device)), time_ids=sizes)

    def zeroed(self, rows: Sequence[int] | Tensor) -> Conditioning:
        """The text of these rows replaced by zeros."""
        if not len(rows):
            return self
        index = rows if isinstance(rows, Tensor) else upload(torch.tensor(rows), self.hidden_states.device)
        return self._with_text(lambda text: text.index_fill(0, index, 0.0))

    def _with_text(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = None if self.pooled is None else change(self.pooled)
        return replace(self, hidden_states=change(self.hidden_states), pooled=pooled)
