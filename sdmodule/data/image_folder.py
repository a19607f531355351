"""Pictures with captions as they are shown in training, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from typing_extensions import override

from sdmodule.conditioning.canny import canny_edges
from sdmodule.data.buckets import Size, bucket_sizes, nearest_bucket
from sdmodule.data.captions import Examples
from sdmodule.data.fingerprints import file_fingerprint
from sdmodule.data.huggingface import HuggingFaceData
from sdmodule.data.readable import load_beside, load_rgb
from sdmodule.data.shapes import CaptionedImage, View
from sdmodule.data.shards import Shards
from sdmodule.data.shuffle import training_loader
from sdmodule.data.sources import Folder, Source, mixed
from sdmodule.errors import SettingsError, choices
from sdmodule.picture_files import upright_size
from sdmodule.pictures import image_to_tensor

CANNY, FILES = "canny", "files"
"""Where the control pictures of a ControlNet come from."""


class ImageFolderDataset(Dataset[CaptionedImage]):
    """Pictures resized to cover ``size`` and cropped to it.

    A random crop or flip depends on (seed, epoch, index) alone, whatever the order or the number of workers.

    Args:
        examples: the pictures' files and captions; pixels are read when asked for.
        size: height and width in pixels.
        center_crop: crop the middle instead of a random part.
        random_flip: mirror half of the pictures.
        seed: names the sequence of crops and flips.
        buckets: give each picture, instead of ``size``, the size of `bucket_sizes` that is most like its shape.
        vary_captions: shuffle the tags of captions whose style asks for it, and draw from several templates.
        conditioning: ``canny`` or ``files``, for the control pictures of a ControlNet.
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
        """Height and width that a picture is shown in."""
        return self.sizes[index] if self.sizes else self.size

    def groups(self) -> dict[Size, list[int]] | None:
        """Indices of the pictures of each size, where sizes differ."""
        if self.sizes is None:
            return None
        groups: dict[Size, list[int]] = {size: [] for size in sorted(set(self.sizes))}
        for index, size in enumerate(self.sizes):
            groups[size].append(index)
        return groups

    def content(self, index: int) -> str:
        """Names what a picture shows, by the bytes of its file."""
        return file_fingerprint(self.examples[index].path)

    def caption(self, index: int) -> str:
        """What a picture is said to show in this epoch."""
        example = self.examples[index]
        return example.style.text(example.caption, self._random(index, "tags") if self.vary_captions else None)

    @property
    def fixed_captions(self) -> bool:
        """Whether a picture has the same caption each time."""
        return not self.vary_captions

    def _random(self, *what: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, int(self._epoch), *what))))

    def view(self, index: int) -> View:
        """How a picture is shown in this epoch."""
        rng = self._random(index)
        x, y = (0.5, 0.5) if self.center_crop else (rng.random(), rng.random())
        return View(x, y, mirrored=self.random_flip and rng.random() < 0.5)

    def seen(self, index: int, view: View) -> dict[str, Tensor]:
        """A picture as it is shown, ``image`` ``[3, H, W]``.

        Beside it its ``mask`` ``[1, H, W]`` if it has one, and ``conditioning`` ``[3, H, W]`` in [0, 1] if that is
        asked for.
        """
        path, _, mask, _, control = self.examples[index]
        image = load_rgb(path)
        height, width = self.size_of(index)
        scale = max(width / image.width, height / image.height)
        covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        left, top = round(view.x * (covering[0] - width)), round(view.y * (covering[1] - height))

        def shown(picture: Image.Image, resampling: Image.Resampling) -> Image.Image:
            part = picture.resize(covering, resampling).crop((left, top, left + width, top + height))
            return ImageOps.mirror(part) if view.mirrored else part

        picture = shown(image, Image.Resampling.BICUBIC)
        example = {"image": image_to_tensor(picture)}
        if self.conditioning == CANNY:
            example["conditioning"] = image_to_tensor(canny_edges(picture)) / 2 + 0.5
        elif control is not None and self.conditioning == FILES:
            followed = shown(load_beside(control, path, image.size, "control picture"), Image.Resampling.BICUBIC)
            example["conditioning"] = image_to_tensor(followed) / 2 + 0.5
        if mask is not None:
            grey = load_beside(mask, path, image.size, "mask").convert("L")
            hole = np.asarray(shown(grey, Image.Resampling.NEAREST))
            example["mask"] = torch.from_numpy((hole > 127).astype(np.float32))[None]
        return example

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        return cast(CaptionedImage, {**self.seen(index, self.view(index)), "caption": self.caption(index)})


class PicturesDataModule(LightningDataModule):
    """Batches of pictures, ``image`` ``[B, 3, H, W]`` in [-1, 1] and ``caption``, a list of strings.

    Where the pictures have masks, ``mask`` ``[B, 1, H, W]`` is 1 where they are white and 0 elsewhere.

    Args:
        sources: where the pictures come from.
        validation: where those for validation come from; ``val_fraction`` is then unused.
        resolution: height and width in pixels; one number gives squares.
        batch_size: pictures a step on each device; fewer pictures give one smaller batch.
        val_fraction: share of each source for validation, at least one picture, chosen by a hash of the name; 0
            validates on none.
        center_crop: crop the middle; otherwise training crops a random part.
        random_flip: mirror half of the pictures in training.
        buckets: train on each picture in the size, of about the same area, that is most like its shape; a batch is of
            one size. Validation crops to ``resolution`` all the same.
        conditioning: control pictures for a ControlNet, ``conditioning`` ``[B, 3, H, W]`` in [0, 1]: ``canny`` for the
            pictures' own edges, ``files`` for those that the metadata name.
        skip_bad: leave files that are no pictures out with a warning, instead of an error.
        num_workers: processes that read pictures; 0 reads in the training process.
        seed: names the order, the crops, the flips and the shuffling of tags.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a source that cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        validation: Source | None = None,
        resolution: int | Sequence[int] = 64,
        batch_size: int = 4,
        val_fraction: float = 0.05,
        center_crop: bool = True,
        random_flip: bool = False,
        buckets: bool = False,
        conditioning: str | None = None,
        skip_bad: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if conditioning not in (None, CANNY, FILES):
            raise SettingsError(f"data.conditioning={conditioning} is not known; give {CANNY} or {FILES}.")
        self.sources = sources
        self.conditioning = conditioning
        self.validation = validation
        size = tuple(resolution) if isinstance(resolution, Sequence) else (resolution, resolution)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise SettingsError(f"data.resolution={resolution} is no size; give a whole number or [height, width].")
        if batch_size < 1:
            raise SettingsError(f"data.batch_size={batch_size} is too small; give 1 or more.")
        if num_workers < 0:
            raise SettingsError(f"data.num_workers={num_workers} is negative; give 0 or more.")
        if not 0 <= val_fraction < 1:
            raise SettingsError(f"data.val_fraction={val_fraction} is out of range; give 0 or more and less than 1.")
        self.size = (size[0], size[1])
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.buckets = buckets
        self.skip_bad = skip_bad
        self.num_workers = num_workers
        self.seed = seed
        self.train_set: ImageFolderDataset | None = None
        self.val_set: ImageFolderDataset | None = None
        self._groups: dict[Size, list[int]] | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        found = [source.examples(self.skip_bad) for source in self.sources]
        if self.validation is not None:
            val = [self.validation.examples(self.skip_bad)]
        else:
            parts = [source.split(own, self.val_fraction) for source, own in zip(self.sources, found, strict=True)]
            found, val = [train for train, _ in parts], [val for _, val in parts]
        train = mixed(found, [source.weight for source in self.sources])
        varied = any(source.varied for source in self.sources)
        self.train_set = ImageFolderDataset(
            train, self.size, self.center_crop, self.random_flip, self.seed, self.buckets, varied, self.conditioning
        )
        self._groups = self.train_set.groups()
        self.val_set = ImageFolderDataset(ConcatDataset(val), self.size, conditioning=self.conditioning)
        self._check_conditioning()

    def _check_conditioning(self) -> None:
        """Whether all pictures have a control picture, where files of them are asked for."""
        assert self.train_set is not None and self.val_set is not None
        for shown in (self.train_set.examples, self.val_set.examples):
            without = (shown[k].path for k in range(len(shown)) if shown[k].control is None)
            if self.conditioning == FILES and (bare := next(without, None)) is not None:
                raise SettingsError(
                    f"data.conditioning={FILES} and {bare} has no control picture; name it in a column "
                    f"conditioning_image_file_name of the metadata, or set data.conditioning={CANNY}."
                )

    @override
    def train_dataloader(self) -> DataLoader:
        assert self.train_set is not None
        together = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        if small := [f"{len(g)} of {h}x{w}" for (h, w), g in (self._groups or {}).items() if len(g) < together]:
            rank_zero_warn(
                f"data.buckets: {', '.join(small)} pixels (height x width) are fewer than the {together} pictures of a "
                "batch, so an epoch shows them more than once; a smaller data.batch_size changes that."
            )
        groups = None if self._groups is None else list(self._groups.values())
        return training_loader(self.train_set, self.batch_size, self.seed, self.num_workers, self.trainer, groups)

    @override
    def val_dataloader(self) -> DataLoader | Iterable:
        assert self.val_set is not None
        if not len(self.val_set):
            return []
        return DataLoader(self.val_set, batch_size=self.batch_size, num_workers=self.num_workers)


class ImageFolderDataModule(PicturesDataModule):
    """Batches of a folder's pictures, or of several sources mixed.

    See `find_examples` for where captions come from. Nothing but paths and captions is held in memory.

    Args:
        root: folder of pictures with captions.
        resolution: height and width in pixels; one number gives squares.
        batch_size: pictures a step on each device.
        val_root: another folder, for validation.
        prompt: one caption for all pictures, which then need none of their own.
        template: a text that captions are put into, in the place of ``{}``; of several one is drawn each time.
        shuffle_tags: put the parts of captions between commas in another order each time, in training.
        keep_tags: how many of the first parts stay where they are.
        sources: several instead of ``root``: each names ``root``, ``shards`` or ``name``, and what else `Folder`,
            `Shards` or `HuggingFaceData` takes and `Source`; settings of captions that one leaves out are those above.
        settings: those of `PicturesDataModule`.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a folder that cannot be used.
    """

    def __init__(
        self,
        root: str | None,
        resolution: int | Sequence[int] = 64,
        batch_size: int = 4,
        val_root: str | None = None,
        *,
        prompt: str | None = None,
        template: str | Sequence[str] | None = None,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        sources: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        style: dict[str, Any] = {"template": template, "shuffle_tags": shuffle_tags, "keep_tags": keep_tags}
        if (root is None) == (sources is None):
            raise SettingsError(
                f"data.root={root} and data.sources={sources} are two ways of one thing; give one of them."
            )
        if sources is None:
            chosen = [Source(Folder(str(root), prompt=prompt), **style)]
        else:
            chosen = [_source({**style, **one}, f"data.sources[{k}]") for k, one in enumerate(sources)]
        if not chosen:
            raise SettingsError("data.sources=[] names no folder; give [{root: …, weight: …}, …].")
        validation = None if val_root is None else Source(Folder(val_root, "data.val_root", prompt), template=template)
        super().__init__(chosen, validation, resolution, batch_size, **settings)


PLACES: dict[str, Any] = {"root": Folder, "shards": Shards, "name": HuggingFaceData}
"""Kinds of places, by the setting that names one."""


def _source(settings: Mapping[str, Any], key: str) -> Source:
    """The source that an entry of ``data.sources`` describes."""
    given = [name for name in PLACES if name in settings]
    if len(given) != 1:
        raise SettingsError(f"{key} names {choices(given) or 'no place'}; give one of {choices(PLACES)}.")
    kind = PLACES[given[0]]
    own = {field.name for field in fields(kind)} & settings.keys()
    rest = {name: value for name, value in settings.items() if name not in own}
    try:
        return Source(kind(**{name: settings[name] for name in own}, key=f"{key}.{given[0]}"), **rest, key=key)
    except TypeError as error:
        raise SettingsError(f"{key} cannot be used ({error}); see conf/data/mixed.yaml for what it takes.") from error
