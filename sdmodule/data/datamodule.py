"""Batches of images with captions: of one place, or of several mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import ConcatDataset, DataLoader
from typing_extensions import override

from sdmodule.data.base import TrainingData
from sdmodule.data.buckets import Size
from sdmodule.data.dataset import CANNY, FILES, ImageFolderDataset
from sdmodule.data.sampler import training_loader
from sdmodule.data.sources.huggingface import HuggingFaceData
from sdmodule.data.sources.mix import Folder, Source, mix_sources
from sdmodule.data.sources.tar_shards import Shards
from sdmodule.errors import SettingsError, choices
from sdmodule.ranges import check_flag, check_seed, check_whole, is_number


class ImageDataModule(TrainingData):
    """Batches of images, ``image`` ``[B, 3, H, W]`` in [-1, 1] and ``caption``, a list of strings.

    Where the images have masks, ``mask`` ``[B, 1, H, W]`` is 1 where they are white and 0 elsewhere; where those of
    some sources alone have, masks are left out.

    Attributes:
        bare: the sources whose images have no masks, known after `setup`.
        shown_set: the images of training as validation would show them, for who looks at them where it has none.

    Args:
        sources: where the images come from.
        validation: where those for validation come from; ``val_fraction`` is then unused.
        resolution: height and width in pixels; one number gives squares.
        batch_size: images a step on each device; fewer images give one smaller batch.
        val_fraction: share of each source for validation, at least one image, chosen by a hash of the name; 0
            validates on none.
        center_crop: crop the middle; otherwise training crops a random part.
        random_flip: mirror half of the images in training.
        buckets: train on each image in the size, of about the same area, that is most like its shape; a batch is of
            one size. Validation crops to ``resolution`` all the same.
        conditioning: control images for a ControlNet, ``conditioning`` ``[B, 3, H, W]`` in [0, 1]: ``canny`` for the
            images' own edges, ``files`` for those that the metadata name.
        skip_bad: leave files that are no images out with a warning, instead of an error.
        num_workers: processes that read images; 0 reads in the training process.
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
        check_whole("data.batch_size", batch_size)
        check_whole("data.num_workers", num_workers, least=0)
        check_seed("data.seed", seed)
        flags = {"center_crop": center_crop, "random_flip": random_flip, "buckets": buckets, "skip_bad": skip_bad}
        for name, flag in flags.items():
            check_flag(f"data.{name}", flag)
        if not is_number(val_fraction) or not 0 <= val_fraction < 1:
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
        self.shown_set: ImageFolderDataset | None = None
        self.bare: list[Source] = []
        self._groups: dict[Size, list[int]] | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        found = [source.examples(self.skip_bad) for source in self.sources]
        self.bare = [source for source, own in zip(self.sources, found, strict=True) if own[0].mask is None]
        if self.bare:  # a batch could not hold the masks of some images
            found = [own.without_masks() for own in found]
        if self.validation is not None:
            val = [self.validation.examples(self.skip_bad)]
        else:
            parts = [source.split(own, self.val_fraction) for source, own in zip(self.sources, found, strict=True)]
            found, val = [train for train, _ in parts], [val for _, val in parts]
        train = mix_sources(found, [source.weight for source in self.sources])
        varied = any(source.varied for source in self.sources)
        self.train_set = ImageFolderDataset(
            train, self.size, self.center_crop, self.random_flip, self.seed, self.buckets, varied, self.conditioning
        )
        self._groups = self.train_set.groups()
        self.val_set = ImageFolderDataset(ConcatDataset(val), self.size, conditioning=self.conditioning)
        self.shown_set = ImageFolderDataset(train, self.size, conditioning=self.conditioning)
        self._check_conditioning()

    def _check_conditioning(self) -> None:
        """Whether all images have a control image, where files of them are asked for."""
        assert self.train_set is not None and self.val_set is not None
        for shown in (self.train_set.examples, self.val_set.examples):
            without = (shown[k].path for k in range(len(shown)) if shown[k].control is None)
            if self.conditioning == FILES and (bare := next(without, None)) is not None:
                raise SettingsError(
                    f"data.conditioning={FILES} and {bare} has no control image; name it in a column "
                    f"conditioning_image_file_name of the metadata, or set data.conditioning={CANNY}."
                )

    @override
    def train_dataloader(self) -> DataLoader:
        assert self.train_set is not None
        together = self.batch_size * (self.trainer.world_size if self.trainer else 1)
        if small := [f"{len(g)} of {h}x{w}" for (h, w), g in (self._groups or {}).items() if len(g) < together]:
            rank_zero_warn(
                f"data.buckets: {', '.join(small)} pixels (height x width) are fewer than the {together} images of a "
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


class ImageFolderDataModule(ImageDataModule):
    """Batches of a folder's images, or of several sources mixed.

    See `find_examples` for where captions come from. Nothing but paths and captions is held in memory.

    Args:
        root: folder of images with captions.
        resolution: height and width in pixels; one number gives squares.
        batch_size: images a step on each device.
        val_root: another folder, for validation.
        prompt: one caption for all images, which then need none of their own; in ``sources``, for those of folders.
        template: a text that captions are put into, in the place of ``{}``; of several one is drawn each time.
        shuffle_tags: put the parts of captions between commas in another order each time, in training.
        keep_tags: how many of the first parts stay where they are.
        sources: several instead of ``root``: each names ``root``, ``shards`` or ``name``, and what else `Folder`,
            `Shards` or `HuggingFaceData` takes and `Source`; settings of captions that one leaves out are those above.
        settings: those of `ImageDataModule`.

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
            if isinstance(sources, (str, Mapping)) or not all(isinstance(one, Mapping) for one in sources):
                raise SettingsError(f"data.sources={sources} is no list of sources; give [{{root: …, weight: …}}, …].")
            chosen = [_source({**style, **one}, f"data.sources[{k}]", prompt) for k, one in enumerate(sources)]
        if not chosen:
            raise SettingsError("data.sources=[] names no folder; give [{root: …, weight: …}, …].")
        validation = None if val_root is None else Source(Folder(val_root, "data.val_root", prompt), template=template)
        super().__init__(chosen, validation, resolution, batch_size, **settings)


PLACES: dict[str, Any] = {"root": Folder, "shards": Shards, "name": HuggingFaceData}
"""Kinds of places, by the setting that names one."""


def _source(settings: Mapping[str, Any], key: str, prompt: str | None) -> Source:
    """The source that an entry of ``data.sources`` describes; ``prompt`` is for folders without one of their own."""
    given = [name for name in PLACES if name in settings]
    if len(given) != 1:
        raise SettingsError(f"{key} names {choices(given) or 'no place'}; give one of {choices(PLACES)}.")
    kind = PLACES[given[0]]
    if prompt is not None and kind is not Folder:
        raise SettingsError(
            f"data.prompt={prompt} is a caption for folders, and {key} names {given[0]}; leave it out, or give entries "
            "with root a prompt of their own."
        )
    settings = settings if prompt is None else {"prompt": prompt, **settings}
    own = {field.name for field in fields(kind)} & settings.keys()
    rest = {name: value for name, value in settings.items() if name not in own}
    try:
        return Source(kind(**{name: settings[name] for name in own}, key=f"{key}.{given[0]}"), **rest, key=key)
    except TypeError as error:
        raise SettingsError(f"{key} cannot be used ({error}); see conf/data/mixed.yaml for what it takes.") from error
