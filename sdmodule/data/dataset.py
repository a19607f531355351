"""Captioned image files as training examples: resized, cropped, flipped, with masks and control images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from sdmodule.conditioning.canny import canny_edges
from sdmodule.data.buckets import Size, bucket_sizes, nearest_bucket
from sdmodule.data.example import CaptionedImage, Examples, IndexedExamples, View
from sdmodule.data.index.file_examples import FileExamples
from sdmodule.data.sources.verify import load_beside, load_rgb
from sdmodule.io.images import image_to_tensor
from sdmodule.io.transparency import mask_levels, on_white

LARGEST_COVERING = 2**26
"""Pixels up to which an image is resized as a whole before it is cropped."""

CANNY, FILES = "canny", "files"
"""Sources of a ControlNet's control images."""


class ImageFolderDataset(Dataset[CaptionedImage]):
    """Images resized to cover ``size`` and cropped to it.

    A random crop or flip depends on (seed, epoch, index) alone, not on the order or the number of workers.

    Args:
        examples: files and captions of the images; pixels are read when they are needed.
        size: height and width in pixels.
        center_crop: crop the centre instead of a random part.
        random_flip: flip half of the images horizontally.
        seed: seed of crops, flips and captions.
        buckets: resize each image to its nearest bucket, see `bucket_sizes`, instead of to ``size``.
        vary_captions: shuffle the tags of captions whose style says so, and draw one of several templates.
        conditioning: ``canny`` or ``files``, for the control images of a ControlNet.
    """

    def __init__(
        self,
        examples: Examples,
        size: tuple[int, int],
        center_crop: bool = True,
        random_flip: bool = False,
        seed: int = 0,
        buckets: bool = False,
        vary_captions: bool = False,
        conditioning: str | None = None,
    ) -> None:
        self.examples = examples if isinstance(examples, IndexedExamples) else FileExamples(examples)
        self.vary_captions = vary_captions
        self.conditioning = conditioning
        self.size = size
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.buckets = bucket_sizes(size) if buckets else None
        self.bucket_of: NDArray[np.int64] | None = None
        if self.buckets is not None:
            self.bucket_of = _nearest(self.examples.sizes(), self.buckets)
        # in shared memory, so that persistent workers see a new epoch
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw new crops, flips and captions."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of an image as the model sees it."""
        if self.buckets is None or self.bucket_of is None:
            return self.size
        return self.buckets[self.bucket_of[index]]

    def groups(self) -> dict[Size, NDArray[np.int64]] | None:
        """Indices of the images in each bucket; None without buckets."""
        if self.buckets is None or self.bucket_of is None:
            return None
        used = {self.buckets[k]: np.flatnonzero(self.bucket_of == k) for k in np.unique(self.bucket_of).tolist()}
        return {size: used[size] for size in sorted(used)}

    def original_size(self, index: int) -> Size:
        """Height and width of an image before it is resized and cropped."""
        width, height = self.examples.size(index)
        return height, width

    def content(self, index: int) -> str:
        """A key of an image's content: the hash of its file."""
        return self.examples.content(index)

    def caption(self, index: int) -> str:
        """The caption of an image in this epoch."""
        example = self.examples[index]
        return example.style.text(example.caption, self._rng(index, "tags") if self.vary_captions else None)

    @property
    def fixed_captions(self) -> bool:
        """Whether an image has the same caption in every epoch."""
        return not self.vary_captions

    def _rng(self, *key: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, int(self._epoch), *key))))

    def view(self, index: int) -> View:
        """The crop and flip of an image in this epoch."""
        rng = self._rng(index)
        x, y = (0.5, 0.5) if self.center_crop else (rng.random(), rng.random())
        return View(x, y, flipped=self.random_flip and rng.random() < 0.5)

    def load(self, index: int, view: View) -> dict[str, Tensor]:
        """The tensors of an image in a view: ``image`` ``[3, H, W]`` in [-1, 1], and its `Crop.sizes`.

        An image with a mask has ``mask`` ``[1, H, W]`` too, and with ``conditioning`` set there is ``conditioning``
        ``[3, H, W]`` in [0, 1]. All share one crop and flip.
        """
        path, _, mask_path, _, control_path = self.examples[index]
        image = load_rgb(path)
        crop = Crop(image.size, self.size_of(index), view)
        cropped = crop(image, Image.Resampling.BICUBIC)
        example = {"image": image_to_tensor(cropped), **crop.sizes()}
        if self.conditioning == CANNY:
            example["conditioning"] = image_to_tensor(canny_edges(cropped)) / 2 + 0.5
        elif control_path is not None and self.conditioning == FILES:
            control = on_white(load_beside(control_path, path, image.size, "control image"))
            example["conditioning"] = image_to_tensor(crop(control, Image.Resampling.BICUBIC)) / 2 + 0.5
        if mask_path is not None:
            levels = mask_levels(load_beside(mask_path, path, image.size, "mask"))
            mask = np.asarray(crop(levels, Image.Resampling.NEAREST))
            example["mask"] = torch.from_numpy((mask > 127).astype(np.float32))[None]
        return example

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        return cast(CaptionedImage, {**self.load(index, self.view(index)), "caption": self.caption(index)})


def _nearest(shapes: NDArray[np.int32], buckets: Sequence[Size]) -> NDArray[np.int64]:
    """The number of the bucket of each width and height, ``[N, 2]``."""
    different, places = np.unique(shapes, axis=0, return_inverse=True)
    numbers = {size: number for number, size in enumerate(buckets)}
    nearest = [numbers[nearest_bucket(width, height, buckets)] for width, height in different.tolist()]
    return np.array(nearest, np.int64)[places.reshape(-1)]


class Crop:
    """Resizes images of one size to cover another, cuts out a part, and flips it.

    Args:
        size: width and height of the images.
        wanted: height and width of the part.
        view: where the part lies, and whether it is flipped.
    """

    def __init__(self, size: tuple[int, int], wanted: tuple[int, int], view: View) -> None:
        height, width = wanted
        scale = max(width / size[0], height / size[1])
        self.original = size[1], size[0]
        self.covering = max(width, round(size[0] * scale)), max(height, round(size[1] * scale))
        left, top = round(view.x * (self.covering[0] - width)), round(view.y * (self.covering[1] - height))
        self.box = (left, top, left + width, top + height)
        self.flipped = view.flipped

    def __call__(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        """The part of an image."""
        part = self._cut(image, resampling)
        return ImageOps.mirror(part) if self.flipped else part

    def sizes(self) -> dict[str, Tensor]:
        """The original size of the images and the crop's corner: ``original_size`` and ``crop_top_left``, each ``[2]``.

        In a mirrored image the left edge is the right one of the crop, as in the training scripts of diffusers.
        """
        left, top, right, _ = self.box
        corner = top, self.covering[0] - right if self.flipped else left
        return {"original_size": torch.tensor(self.original), "crop_top_left": torch.tensor(corner)}

    def _cut(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        if self.covering[0] * self.covering[1] <= LARGEST_COVERING:
            return image.resize(self.covering, resampling).crop(self.box)
        # of a very thin image the whole would not fit into memory
        across, down = image.width / self.covering[0], image.height / self.covering[1]
        x0, y0, x1, y1 = self.box
        return image.resize((x1 - x0, y1 - y0), resampling, (x0 * across, y0 * down, x1 * across, y1 * down))
