"""Images with captions as they are shown in training: cut out, mirrored, with masks and control images."""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from sdmodule.conditioning.canny import canny_edges
from sdmodule.data.buckets import Size, bucket_sizes, nearest_bucket
from sdmodule.data.sources.folder import Examples
from sdmodule.data.sources.verify import load_beside, load_rgb
from sdmodule.data.toy.dataset import CaptionedImage, View
from sdmodule.io.fingerprint import file_fingerprint
from sdmodule.io.image_files import upright_size
from sdmodule.io.images import image_to_tensor

CANNY, FILES = "canny", "files"
"""Where the control images of a ControlNet come from."""


class ImageFolderDataset(Dataset[CaptionedImage]):
    """Images resized to cover ``size`` and cropped to it.

    A random crop or flip depends on (seed, epoch, index) alone, whatever the order or the number of workers.

    Args:
        examples: the images' files and captions; pixels are read when asked for.
        size: height and width in pixels.
        center_crop: crop the middle instead of a random part.
        random_flip: mirror half of the images.
        seed: names the sequence of crops and flips.
        buckets: give each image, instead of ``size``, the size of `bucket_sizes` that is most like its shape.
        vary_captions: shuffle the tags of captions whose style asks for it, and draw from several templates.
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
        self.examples = examples
        self.vary_captions = vary_captions
        self.conditioning = conditioning
        self.size = size
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self.sizes: list[Size] | None = None
        if buckets:
            allowed = bucket_sizes(size)
            shapes = (upright_size(examples[index].path) for index in range(len(examples)))
            self.sizes = [nearest_bucket(*shape, allowed) for shape in shapes]
        # shared, so that persistent workers see a new epoch
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and flips from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that an image is shown in."""
        return self.sizes[index] if self.sizes else self.size

    def groups(self) -> dict[Size, list[int]] | None:
        """Indices of the images of each size, where sizes differ."""
        if self.sizes is None:
            return None
        groups: dict[Size, list[int]] = {size: [] for size in sorted(set(self.sizes))}
        for index, size in enumerate(self.sizes):
            groups[size].append(index)
        return groups

    def content(self, index: int) -> str:
        """Names what an image shows, by the bytes of its file."""
        return file_fingerprint(self.examples[index].path)

    def caption(self, index: int) -> str:
        """What an image is said to show in this epoch."""
        example = self.examples[index]
        return example.style.text(example.caption, self._random(index, "tags") if self.vary_captions else None)

    @property
    def fixed_captions(self) -> bool:
        """Whether an image has the same caption each time."""
        return not self.vary_captions

    def _random(self, *what: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, int(self._epoch), *what))))

    def view(self, index: int) -> View:
        """How an image is shown in this epoch."""
        rng = self._random(index)
        x, y = (0.5, 0.5) if self.center_crop else (rng.random(), rng.random())
        return View(x, y, mirrored=self.random_flip and rng.random() < 0.5)

    def seen(self, index: int, view: View) -> dict[str, Tensor]:
        """An image as it is shown, ``image`` ``[3, H, W]``.

        Beside it its ``mask`` ``[1, H, W]`` if it has one, and ``conditioning`` ``[3, H, W]`` in [0, 1] if that is
        asked for.
        """
        path, _, mask, _, control = self.examples[index]
        image = load_rgb(path)
        height, width = self.size_of(index)
        scale = max(width / image.width, height / image.height)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = round(view.x * (covering[0] - width)), round(view.y * (covering[1] - height))

        def shown(whole: Image.Image, resampling: Image.Resampling) -> Image.Image:
            part = whole.resize(covering, resampling).crop((left, top, left + width, top + height))
            return ImageOps.mirror(part) if view.mirrored else part

        crop = shown(image, Image.Resampling.BICUBIC)
        example = {"image": image_to_tensor(crop)}
        if self.conditioning == CANNY:
            example["conditioning"] = image_to_tensor(canny_edges(crop)) / 2 + 0.5
        elif control is not None and self.conditioning == FILES:
            followed = shown(load_beside(control, path, image.size, "control image"), Image.Resampling.BICUBIC)
            example["conditioning"] = image_to_tensor(followed) / 2 + 0.5
        if mask is not None:
            grey = load_beside(mask, path, image.size, "mask").convert("L")
            hole = np.asarray(shown(grey, Image.Resampling.NEAREST))
            example["mask"] = torch.from_numpy((hole > 127).astype(np.float32))[None]
        return example

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        return cast(CaptionedImage, {**self.seen(index, self.view(index)), "caption": self.caption(index)})
