"""A folder of pictures with captions, in the layout of Hugging Face's ``imagefolder`` or with a ``.txt`` a picture."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.data.shapes import CaptionedImage
from sdmodule.data.shuffle import training_loader
from sdmodule.errors import SettingsError, choices
from sdmodule.pictures import image_to_tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class Example(NamedTuple):
    """A picture's file and its caption."""

    path: Path
    caption: str


def find_examples(root: str | Path, key: str = "data.root") -> list[Example]:
    """List a folder's pictures with their captions, sorted by name; the pictures are not opened.

    Captions come from the first of these that exists: ``metadata.jsonl``, ``metadata.csv`` (columns ``file_name``,
    relative to the folder, and ``text``), or a ``.txt`` beside each picture. Subfolders count; hidden files do not.
    Pictures that a metadata file does not name are left out, with a warning.

    Args:
        root: the folder.
        key: the setting that gave the folder, for the messages.

    Raises:
        SettingsError: if the folder or its captions are missing, incomplete or malformed.
    """
    folder = _absolute(root)
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise SettingsError(f"{key}={root} {problem}; give a folder of pictures with captions.")
    pictures = {path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not _hidden(path, folder)}
    metadata = next((file for name in ("metadata.jsonl", "metadata.csv") if (file := folder / name).is_file()), None)
    if metadata is None:
        if not pictures:
            raise SettingsError(f"{key}={root} holds no pictures; pictures end in {choices(SUFFIXES)}.")
        return _read_sidecars(sorted(pictures), folder, key)

    examples = sorted(_read_metadata(metadata, key))
    if not examples:
        raise SettingsError(f"{key}: {metadata} names no pictures; give it a row with file_name and text for each.")
    named = {path for path, _ in examples}
    if absent := sorted(path for path in named if not path.is_file()):
        raise SettingsError(
            f"{key}: {metadata} names pictures that do not exist: {_some(absent, folder)}; "
            "file_name is relative to the folder of that file: add the pictures or remove their rows."
        )
    if unnamed := sorted(pictures - named):
        rank_zero_warn(f"{key}: left out {len(unnamed)} pictures not named in {metadata}: {_some(unnamed, folder)}.")
    return examples


def _absolute(root: str | Path) -> Path:
    """Tidy a path without following links: pictures may be links to files elsewhere."""
    return Path(os.path.abspath(Path(root).expanduser()))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _some(paths: Sequence[Path], folder: Path, limit: int = 3) -> str:
    """Name the first few of ``paths`` and count the rest."""
    names = ", ".join(path.relative_to(folder).as_posix() for path in paths[:limit])
    return names if len(paths) <= limit else f"{names} and {len(paths) - limit} more"


def _read_sidecars(pictures: Sequence[Path], folder: Path, key: str) -> list[Example]:
    """Read the ``.txt`` beside each picture."""
    if bare := [path for path in pictures if not path.with_suffix(".txt").is_file()]:
        raise SettingsError(
            f"{key}={folder} has {len(bare)} pictures without a caption: {_some(bare, folder)}; "
            "put a metadata.jsonl or metadata.csv (file_name, text) in the folder, or a .txt beside each picture."
        )
    return [Example(path, _read_text(path.with_suffix(".txt"), key).strip()) for path in pictures]


def _read_text(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{key}: {path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def _read_metadata(path: Path, key: str) -> Iterator[Example]:
    """Read the rows of a ``metadata.jsonl`` or ``metadata.csv``."""
    for line, row in (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path, key):
        where = f"{key}: {path}, line {line}"
        if missing := {"file_name", "text"} - row.keys():
            raise SettingsError(
                f"{where} has no {choices(missing)}, only {choices(map(str, row))}; file_name and text are needed."
            )
        name, text = row["file_name"], row["text"]
        if not isinstance(name, str) or not isinstance(text, str):
            raise SettingsError(f"{where} has file_name={name!r} and text={text!r}; both must be strings.")
        picture = Path(os.path.normpath(path.parent / name))
        if not picture.is_relative_to(path.parent):
            raise SettingsError(f"{where} names {name}, outside the folder; move the picture into {path.parent}.")
        yield Example(picture, text)


def _jsonl_rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(_read_text(path, key).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SettingsError(f"{key}: {path}, line {number} is no JSON ({error}); write objects.") from error
        if not isinstance(row, dict):
            raise SettingsError(f"{key}: {path}, line {number} is {line.strip()}; write an object with both columns.")
        yield number, row


def _csv_rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(_read_text(path, key).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise SettingsError(f"{key}: {path}, line {reader.line_num} is no CSV ({error}); check its quotes.") from error


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
    problems = {path: problem for path, _ in examples if (problem := _problem(path))}
    if not problems:
        return list(examples)
    bad = list(problems)
    if not skip_bad:
        raise SettingsError(
            f"{key}={folder} has {len(bad)} files that are no readable pictures: {_some(bad, folder)} "
            f"({problems[bad[0]]}); replace them, or set data.skip_bad=true to leave them out."
        )
    if len(problems) == len({path for path, _ in examples}):
        raise SettingsError(f"{key}={folder} has no readable picture left after skipping {_some(bad, folder)}.")
    rank_zero_warn(f"{key}: skipped {len(bad)} unreadable pictures: {_some(bad, folder, limit=20)}.")
    return [example for example in examples if example.path not in problems]


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
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:
        raise SettingsError(f"data: {path} cannot be decoded ({error}); replace or remove it.") from error
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
        path, caption = self.examples[index]
        image = load_rgb(path)
        height, width = self.size
        scale = max(width / image.width, height / image.height)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(covering, Image.Resampling.BICUBIC)
        x, y = (0.5, 0.5) if self.center_crop else (rng.random(), rng.random())
        left, top = round(x * (image.width - width)), round(y * (image.height - height))
        image = image.crop((left, top, left + width, top + height))
        if self.random_flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return {"image": image_to_tensor(image), "caption": caption}


class ImageFolderDataModule(LightningDataModule):
    """Batches of a folder's pictures, ``image`` ``[B, 3, H, W]`` in [-1, 1] and ``caption``, a list of strings.

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
        return keep_readable(find_examples(root, key), _absolute(root), self.skip_bad, key)

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
        folder = _absolute(self.root)

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
