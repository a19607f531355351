"""Data modules of captioned images: from a folder, tar shards, a Hugging Face data set, or several of them mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from typing_extensions import override

from sdmodule.data.base import TrainingData
from sdmodule.data.buckets import Size, parse_size
from sdmodule.data.dataset import CANNY, FILES, ImageFolderDataset
from sdmodule.data.sampler import Groups, training_loader
from sdmodule.data.sources.folder import Folder
from sdmodule.data.sources.huggingface import HuggingFaceData
from sdmodule.data.sources.mix import JoinedImages, WeightedSource, check_control_images, mix_sources, parse_source
from sdmodule.data.sources.tar_shards import Shards
from sdmodule.data.sources.verify import STAT, VERIFICATIONS
from sdmodule.data.worker_processes import check_workers, loading_options
from sdmodule.errors import SettingsError, check_bool, check_choice, check_int, check_number, check_seed


class ImageDataModule(TrainingData):
    """Batches of images, ``image`` ``[B, 3, H, W]`` in [-1, 1] and ``caption``, a list of strings.

    If the images have masks, ``mask`` ``[B, 1, H, W]`` is 1 where they are white and 0 elsewhere; if only some sources
    have masks, they are left out.

    Attributes:
        bare: the sources whose images have no masks; known after `setup`.
        preview_set: the training images as validation would show them, to sample from where there is no validation set.

    Args:
        sources: the sources of the images.
        validation: the source of the validation images; ``val_fraction`` is then unused.
        resolution: height and width in pixels; one number gives squares.
        batch_size: images per batch on each device; if there are fewer images, one smaller batch.
        val_fraction: share of each source for validation, at least one image, chosen by a hash of the name; 0 for no
            validation.
        center_crop: crop the centre; otherwise training crops a random part.
        random_flip: flip half of the training images horizontally.
        buckets: train on each image in its aspect-ratio bucket; all images of a batch have one size. Validation crops
            to ``resolution`` all the same.
        conditioning: control images for a ControlNet, ``conditioning`` ``[B, 3, H, W]`` in [0, 1]: ``canny`` for the
            edges of the images, ``files`` for the control images that the metadata name.
        skip_bad: leave unreadable files out with a warning instead of an error.
        num_workers: processes that load images; 0 loads in the training's own; None is by device: `loading_options`.
        seed: seed of the order, the crops, the flips and the shuffled tags.
        verify: how files that have changed since an earlier start are noticed: ``stat``, by size and date, or
            ``content``.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a source that cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[WeightedSource],
        validation: WeightedSource | None = None,
        resolution: int | Sequence[int] = 64,
        batch_size: int = 4,
        val_fraction: float = 0.05,
        center_crop: bool = True,
        random_flip: bool = False,
        buckets: bool = False,
        conditioning: str | None = None,
        skip_bad: bool = False,
        num_workers: int | None = None,
        seed: int = 0,
        verify: str = STAT,
    ) -> None:
        super().__init__()
        check_choice("cache.verify", verify, VERIFICATIONS)
        if conditioning is not None:
            check_choice("data.conditioning", conditioning, (CANNY, FILES))
        check_int("data.batch_size", batch_size)
        check_workers(num_workers)
        check_seed("data.seed", seed)
        check_bool("data.center_crop", center_crop)
        check_bool("data.random_flip", random_flip)
        check_bool("data.buckets", buckets)
        check_bool("data.skip_bad", skip_bad)
        check_number("data.val_fraction", val_fraction, minimum=0, below=1)
        self.sources = sources
        self.validation = validation
        self.size = parse_size(resolution)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.buckets = buckets
        self.conditioning = conditioning
        self.skip_bad = skip_bad
        self.num_workers = num_workers
        self.seed = seed
        self.verify = verify
        self.train_set: ImageFolderDataset | None = None
        self.val_set: ImageFolderDataset | None = None
        self.preview_set: ImageFolderDataset | None = None
        self.bare: list[WeightedSource] = []
        self._groups: dict[Size, NDArray[np.int64]] | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        found = [source.examples(self.skip_bad, self.verify) for source in self.sources]
        if self.conditioning == FILES:
            check_control_images(found)
        self.bare = [source for source, own in zip(self.sources, found, strict=True) if own[0].mask is None]
        if self.bare:  # a batch cannot hold the masks of some of its images only
            found = [own.without_masks() for own in found]
        if self.validation is not None:
            val = [self.validation.examples(self.skip_bad, self.verify)]
            if self.conditioning == FILES:
                check_control_images(val)
        else:
            parts = [source.split(own, self.val_fraction) for source, own in zip(self.sources, found, strict=True)]
            found, val = [train for train, _ in parts], [val for _, val in parts]
        train = mix_sources(found, [source.weight for source in self.sources])
        varied = any(source.varied for source in self.sources)
        self.train_set = ImageFolderDataset(
            train, self.size, self.center_crop, self.random_flip, self.seed, self.buckets, varied, self.conditioning
        )
        self._groups = self.train_set.groups()
        self.val_set = ImageFolderDataset(JoinedImages(val), self.size, conditioning=self.conditioning)
        self.preview_set = ImageFolderDataset(train, self.size, conditioning=self.conditioning)

    @override
    def train_dataloader(self) -> DataLoader:
        assert self.train_set is not None
        count = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        if small := [f"{len(g)} of {h}x{w}" for (h, w), g in (self._groups or {}).items() if len(g) < count]:
            rank_zero_warn(
                f"data.buckets=true: some buckets have fewer than the {count} images of a batch: {', '.join(small)} "
                "pixels (height x width); an epoch repeats their images. A smaller data.batch_size avoids that."
            )
        groups: Groups | None = None if self._groups is None else [*self._groups.values()]
        settings = (self.batch_size, self.seed, self.num_workers, self.trainer, groups)
        return training_loader(self.train_set, *settings, earlier=self.earlier)

    @override
    def val_dataloader(self) -> DataLoader | Iterable:
        assert self.val_set is not None
        if not len(self.val_set):
            return []
        batches = -(-len(self.val_set) // self.batch_size)
        options = loading_options(self.num_workers, self.trainer, batches)
        return DataLoader(self.val_set, batch_size=self.batch_size, **options)


class ImageFolderDataModule(ImageDataModule):
    """Batches of the images of a folder, or of several sources mixed.

    Only paths and captions are held in memory; see `find_examples` for where captions come from.

    Args:
        root: folder of images with captions.
        resolution: height and width in pixels; one number gives squares.
        batch_size: images per batch on each device.
        val_root: another folder, for validation.
        prompt: one caption for all images, which then need none of their own; with ``sources``, for those of folders.
        template: a text in which ``{}`` is replaced by the caption; of several, one is drawn each time.
        shuffle_tags: shuffle the comma-separated parts of a caption each time, in training.
        keep_tags: how many of the first parts stay in place.
        sources: several sources instead of ``root``. Each gives ``root``, ``shards`` or ``name``, and optionally the
            other settings of `Folder`, `Shards` or `HuggingFaceData` and of `WeightedSource`; the caption settings
            above are the defaults.
        settings: settings of `ImageDataModule`.

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
            raise SettingsError(f"data.root={root}, data.sources={sources}: exactly one is needed; give one of them.")
        if sources is None:
            parsed = [WeightedSource(Folder(str(root), prompt=prompt), **style)]
        else:
            if isinstance(sources, (str, Mapping)) or not all(isinstance(entry, Mapping) for entry in sources):
                raise SettingsError(
                    f"data.sources={sources}: must be a list of sources; give [{{root: …, weight: …}}, …]."
                )
            parsed = [parse_source({**style, **entry}, f"data.sources[{k}]", prompt) for k, entry in enumerate(sources)]
        if not parsed:
            raise SettingsError("data.sources=[]: is empty; give [{root: …, weight: …}, …].")
        validation = None
        if val_root is not None:
            validation = WeightedSource(Folder(val_root, "data.val_root", prompt), template=template)
        super().__init__(parsed, validation, resolution, batch_size, **settings)


class HuggingFaceDataModule(ImageDataModule):
    """Batches of the images of a Hugging Face data set; see `HuggingFaceData`.

    Args:
        name: a hub id, or a folder.
        split: the split to train on.
        val_split: another split, for validation.
        subset: the configuration, if the data set has several.
        revision: branch, tag or commit of a hub id.
        image_column: the column of images.
        caption_column: the column of captions.
        template: a text in which ``{}`` is replaced by the caption; of several, one is drawn each time.
        shuffle_tags: shuffle the comma-separated parts of a caption each time, in training.
        keep_tags: how many of the first parts stay in place.
        settings: settings of `ImageDataModule`.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a data set that cannot be used.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        val_split: str | None = None,
        *,
        subset: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        caption_column: str = "text",
        template: str | Sequence[str] | None = None,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        **settings: Any,
    ) -> None:
        data = HuggingFaceData(name, split, subset, revision, image_column, caption_column)
        source = WeightedSource(data, template=template, shuffle_tags=shuffle_tags, keep_tags=keep_tags)
        validation = None
        if val_split is not None:
            validation = WeightedSource(replace(data, split=val_split), template=template)
        super().__init__([source], validation, **settings)


class ShardsDataModule(ImageDataModule):
    """Batches of the images in tar shards; see `Shards`.

    Args:
        shards: a path, which may contain ``{000..009}``, ``{a,b}`` or ``*``, or several.
        val_shards: other shards, for validation.
        caption_key: key of the caption in a ``.json``.
        template: a text in which ``{}`` is replaced by the caption; of several, one is drawn each time.
        shuffle_tags: shuffle the comma-separated parts of a caption each time, in training.
        keep_tags: how many of the first parts stay in place.
        settings: settings of `ImageDataModule`.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for shards that cannot be used.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        val_shards: str | Sequence[str] | None = None,
        *,
        caption_key: str = "caption",
        template: str | Sequence[str] | None = None,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        **settings: Any,
    ) -> None:
        source = WeightedSource(
            Shards(shards, caption_key), template=template, shuffle_tags=shuffle_tags, keep_tags=keep_tags
        )
        validation = None
        if val_shards is not None:
            validation = WeightedSource(Shards(val_shards, caption_key, "data.val_shards"), template=template)
        super().__init__([source], validation, **settings)
