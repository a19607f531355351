"""What a metric's features come from: any object with these methods, and how images pass through it in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

T = TypeVar("T")


@runtime_checkable
class ImageFeatures(Protocol):
    """Maps images to vectors.

    Attributes:
        name: what reports call it.
    """

    name: str

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features ``[N, D]`` of N RGB images of any sizes, float32 on the CPU, not normalized."""
        ...


@runtime_checkable
class Scorer(ImageFeatures, Protocol):
    """Maps images and texts into one space, in which an image lies near the texts that describe it."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features ``[N, D]`` of N texts, float32 on the CPU, not normalized."""
        ...


def features_of(images: Iterable[Image.Image], extractors: Sequence[ImageFeatures], batch_size: int) -> list[Tensor]:
    """Features ``[N, D]`` of images by each extractor; no more than a batch of the images is in memory."""
    rows = [[extractor.image_features(batch) for extractor in extractors] for batch in batches(images, batch_size)]
    return [torch.cat(columns) for columns in zip(*rows, strict=True)]


def features_of_texts(texts: Sequence[str], scorer: Scorer, batch_size: int) -> Tensor:
    """Features ``[N, D]`` of texts; equal texts are encoded once."""
    distinct = list(dict.fromkeys(texts))
    encoded = torch.cat([scorer.text_features(batch) for batch in batches(distinct, batch_size)])
    row = {text: k for k, text in enumerate(distinct)}
    return encoded[[row[text] for text in texts]]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items in their order; the last one may be shorter."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch
