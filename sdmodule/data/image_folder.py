"""Batches of a folder's pictures with their captions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.data.captions import Example, absolute, find_examples, some
from sdmodule.data.shapes import CaptionedImage
from sdmodule.data.shuffle import training_loader
from sdmodule.errors import SettingsError, choices
from sdmodule.picture_files import FORMATS, SUFFIXES, open_upright
from sdmodule.pictures import image_to_tensor


def keep_readable(examples: Sequence[Example], folder: Path, skip_bad: bool, key: str = "data.root") -> list[Example]:
    """Check the header of every picture; a file that PIL cannot read as a picture is an error, or is skipped.

    Args:
        examples: pictures of one folder.
        folder: that folder.
        skip_bad: leave the bad ones out with one warning that counts and names them.
        key: the setting that gave the folder, for the messages.

    Raises:
        SettingsError: if a picture is bad and ``skip_bad`` is false, or if none is good.
    """
    paths = dict.fromkeys(path for example in examples for path in (example.path, example.mask) if path is not None)
    problems = {path: problem for path in paths if (problem := _problem(path))}
    if not problems:
        return list(examples)
    bad = list(problems)
    if not skip_bad:
        raise SettingsError(
            f"{key}={folder} has {len(bad)} files that are no readable pictures: {some(bad, folder)} "
            f"({problems[bad[0]]}); replace them, or set data.skip_bad=true to leave them out."
        )
    good = [example for example in examples if not {example.path, example.mask} & problems.keys()]
    if not good:
        raise SettingsError(f"{key}={folder} has no readable picture left after skipping {some(bad, folder)}.")
    rank_zero_warn(f"{key}: skipped {len(bad)} unreadable pictures: {some(bad, folder, limit=20)}.")
    return good


def _problem(path: Path) -> str | None:
    """Say what is wrong with a picture's file, as far as its header and checksums tell."""
    if path.suffix.lower() not in SUFFIXES:
        return f"{path.suffix or 'no suffix'} is none of {choices(SUFFIXES)}"
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode == "F":
                return "floating-point pixels have no fixed range"
            image.verify()
    except Exception as error:  # PIL's plugins let many kinds through: OSError, SyntaxError, struct.error, bomb errors
        return str(error)
    return None


def load_rgb(path: Path) -> Image.Image:
    """Read a picture as 8-bit RGB: upright, transparent parts on white, 16 bits scaled to 8, the first frame only.

    Raises:
        SettingsError: if its pixels cannot be decoded, or are more than PIL's limit.
    """
    try:
        image = open_upright(path)
    except Exception as error:
        raise SettingsError(f"data: {path} cannot be decoded ({error}); replace or remove it.") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_mask(path: Path, picture: Path, size: tuple[int, int]) -> Image.Image:
    """Read the mask of a picture of ``size`` as 8-bit grey.

    Raises:
        SettingsError: if its pixels cannot be decoded, or it has another size.
    """
    mask = load_rgb(path).convert("L")
    if mask.size != size:
        raise SettingsError(
            f"data: the mask {path} is of {mask.width}x{mask.height} pixels and {picture} of {size[0]}x{size[1]}; "
            "give a mask of the picture's size."
        )
    return mask


class ImageFolderDataset(Dataset[CaptionedImage]):
    """Pictures resized to cover ``size`` and cropped to it.

    A random crop or flip depends on (seed, epoch, index) alone, whatever the order or the number of workers.

    Args:
        examples: the pictures' files and captions; pixels are read when asked for.
        size: height and width in pixels.
        center_crop: crop the middle instead of a random part.
        random_flip: mirror half of the pictures.
        seed: names the sequence of crops and flips.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        size: tuple[int, int],
        center_crop: bool = True,
        random_flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.examples = examples
        self.size = size
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        # shared, so that persistent workers see a new epoch
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and flips from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.examples)

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        rng = random.Random(f"{self.seed}/{int(self._epoch)}/{index}")
        path, caption, mask = self.examples[index]
        image = load_rgb(path)
        height, width = self.size
        scale = max(width / image.width, height / image.height)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        x, y = (0.5, 0.5) if self.center_crop else (rng.random(), rng.random())
        left, top = round(x * (covering[0] - width)), round(y * (covering[1] - height))
        flip = self.random_flip and rng.random() < 0.5

        def seen(picture: Image.Image, resampling: Image.Resampling) -> Image.Image:
            part = picture.resize(covering, resampling).crop((left, top, left + width, top + height))
            return ImageOps.mirror(part) if flip else part

        example: CaptionedImage = {
            "image": image_to_tensor(seen(image, Image.Resampling.BICUBIC)),
            "caption": caption,
        }
        if mask is not None:
            hole = np.asarray(seen(load_mask(mask, path, image.size), Image.Resampling.NEAREST))
            example["mask"] = torch.from_numpy((hole > 127).astype(np.float32))[None]
        return example


class ImageFolderDataModule(LightningDataModule):
    """Batches of a folder's pictures, ``image`` ``[B, 3, H, W]`` in [-1, 1] and ``caption``, a list of strings.

    Where the folder names masks, ``mask`` ``[B, 1, H, W]`` is 1 where they are white and 0 elsewhere.

    See `find_examples` for where captions come from. Nothing but paths and captions is held in memory.

    Args:
        root: folder of pictures with captions.
        resolution: height and width in pixels; one number gives squares.
        batch_size: pictures a step on each device; a folder with fewer gives one smaller batch.
        val_root: another folder, for validation; ``val_fraction`` is then unused.
        val_fraction: share of ``root`` for validation, at least one picture, chosen by a hash of the file name;
            0 validates on none.
        center_crop: crop the middle; otherwise training crops a random part.
        random_flip: mirror half of the pictures in training.
        skip_bad: leave files that are no pictures out with a warning, instead of an error.
        num_workers: processes that read pictures; 0 reads in the training process.
        seed: names the order, the crops and the flips.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a folder that cannot be used.
    """

    def __init__(
        self,
        root: str,
        resolution: int | Sequence[int] = 64,
        batch_size: int = 4,
        val_root: str | None = None,
        val_fraction: float = 0.05,
        center_crop: bool = True,
        random_flip: bool = False,
        skip_bad: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        size = tuple(resolution) if isinstance(resolution, Sequence) else (resolution, resolution)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise SettingsError(f"data.resolution={resolution} is no size; give a whole number or [height, width].")
        if batch_size < 1:
            raise SettingsError(f"data.batch_size={batch_size} is too small; give 1 or more.")
        if num_workers < 0:
            raise SettingsError(f"data.num_workers={num_workers} is negative; give 0 or more.")
        if not 0 <= val_fraction < 1:
            raise SettingsError(f"data.val_fraction={val_fraction} is out of range; give 0 or more and less than 1.")
        self.root = root
        self.size = (size[0], size[1])
        self.batch_size = batch_size
        self.val_root = val_root
        self.val_fraction = val_fraction
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.skip_bad = skip_bad
        self.num_workers = num_workers
        self.seed = seed
        self.train_set: ImageFolderDataset | None = None
        self.val_set: ImageFolderDataset | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        train = self._examples(self.root, "data.root")
        if self.val_root is not None:
            val = self._examples(self.val_root, "data.val_root")
        else:
            train, val = self._split(train)
        self.train_set = ImageFolderDataset(train, self.size, self.center_crop, self.random_flip, self.seed)
        self.val_set = ImageFolderDataset(val, self.size)

    def _examples(self, root: str, key: str) -> list[Example]:
        return keep_readable(find_examples(root, key), absolute(root), self.skip_bad, key)

    def _split(self, examples: list[Example]) -> tuple[list[Example], list[Example]]:
        """Part the pictures by a hash of their names: adding some to the folder moves few of the others."""
        if not self.val_fraction:
            return examples, []
        if len(examples) == 1:
            raise SettingsError(
                f"data.root={self.root} has one picture, so data.val_fraction={self.val_fraction} leaves none to train "
                "on; set data.val_fraction=0, or give data.val_root."
            )
        count = min(max(1, round(self.val_fraction * len(examples))), len(examples) - 1)
        folder = absolute(self.root)

        def name_hash(example: Example) -> bytes:
            return hashlib.sha256(example.path.relative_to(folder).as_posix().encode()).digest()

        ranked = sorted(examples, key=name_hash)
        return sorted(ranked[count:]), sorted(ranked[:count])

    @override
    def train_dataloader(self) -> DataLoader:
        assert self.train_set is not None
        return training_loader(self.train_set, self.batch_size, self.seed, self.num_workers, self.trainer)

    @override
    def val_dataloader(self) -> DataLoader | Iterable:
        assert self.val_set is not None
        if not len(self.val_set):
            return []
        return DataLoader(self.val_set, batch_size=self.batch_size, num_workers=self.num_workers)
