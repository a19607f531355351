"""Training images from one source or several, mixed by weight, each with its own style of captions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset
from typing_extensions import override

from sdmodule.data.buckets import Size
from sdmodule.data.example import CaptionStyle, Example, IndexedExamples
from sdmodule.data.index.columns import ExampleColumns
from sdmodule.data.sources.folder import Folder
from sdmodule.data.sources.huggingface import HuggingFaceData
from sdmodule.data.sources.plain import PlainSource
from sdmodule.data.sources.tar_shards import Shards
from sdmodule.data.sources.verify import STAT, ImageSource, readable_images
from sdmodule.errors import SettingsError, check_bool, check_int, check_number, choices

KINDS: dict[str, Any] = {"root": Folder, "shards": Shards, "name": HuggingFaceData}
"""Classes of sources, by the setting that gives one."""


Positions = NDArray[np.int64]


class ImageSubset(Dataset[Example]):
    """Some images of a source, looked up lazily.

    Args:
        examples: all images of the source.
        indices: which of them, in which order.
        style: how their captions are rewritten.
        masks: keep their masks, if they have any.
    """

    def __init__(
        self, examples: IndexedExamples, indices: Positions | range, style: CaptionStyle, masks: bool = True
    ) -> None:
        self.examples = examples
        self.indices = np.asarray(indices, np.int64)
        self.style = style
        self.masks = masks

    def __len__(self) -> int:
        return len(self.indices)

    @override
    def __getitem__(self, index: int) -> Example:
        example = self.examples[int(self.indices[index])]._replace(style=self.style)
        return example if self.masks else example._replace(mask=None)

    def size(self, row: int) -> Size:
        """Width and height of an image, upright."""
        return self.examples.size(int(self.indices[row]))

    def sizes(self) -> NDArray[np.int32]:
        """Width and height of all images, upright, ``[N, 2]``."""
        return self.examples.sizes()[self.indices]

    def content(self, row: int) -> str:
        """The fingerprint of an image's bytes."""
        return self.examples.content(int(self.indices[row]))

    def select(self, positions: Positions | range) -> ImageSubset:
        """The images at some positions of this subset; a position may repeat."""
        return ImageSubset(self.examples, self.indices[np.asarray(positions, np.int64)], self.style, self.masks)

    def without_masks(self) -> ImageSubset:
        """The same images without their masks."""
        return ImageSubset(self.examples, self.indices, self.style, masks=False)


class JoinedImages(ConcatDataset[Example]):
    """Images of several sources, one after the other."""

    def _at(self, row: int) -> tuple[IndexedExamples, int]:
        """The source of an image, and its place there."""
        number = bisect_right(self.cumulative_sizes, row)
        before = self.cumulative_sizes[number - 1] if number else 0
        return self.datasets[number], row - before  # type: ignore[return-value]

    def size(self, row: int) -> Size:
        """Width and height of an image, upright."""
        source, place = self._at(row)
        return source.size(place)

    def sizes(self) -> NDArray[np.int32]:
        """Width and height of all images, upright, ``[N, 2]``."""
        return np.concatenate([source.sizes() for source in self.datasets])  # type: ignore[attr-defined]

    def content(self, row: int) -> str:
        """The fingerprint of an image's bytes."""
        source, place = self._at(row)
        return source.content(place)


@dataclass(frozen=True)
class WeightedSource:
    """A source of images, its share of an epoch, and the style of its captions.

    Args:
        source: where the images are.
        weight: share of an epoch, relative to the weights of the other sources.
        template: a text in which ``{}`` is replaced by the caption; of several, one is drawn each time.
        shuffle_tags: shuffle the comma-separated parts of a caption each time.
        keep_tags: how many of the first parts stay in place.
        key: name of the setting that gave the source, for messages.

    Raises:
        SettingsError: for a setting out of range.
    """

    source: ImageSource | PlainSource
    weight: float = 1.0
    template: str | Sequence[str] | None = None
    shuffle_tags: bool = False
    keep_tags: int = 0
    key: str = "data"

    def __post_init__(self) -> None:
        check_number(f"{self.key}.weight", self.weight, above=0, below=1e6)
        for template in self.templates:
            if "{}" not in str(template):
                raise SettingsError(
                    f"{self.key}.template={template}: contains no {{}}; write {{}} where the caption goes."
                )
        check_bool(f"{self.key}.shuffle_tags", self.shuffle_tags)
        check_int(f"{self.key}.keep_tags", self.keep_tags, minimum=0)

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates."""
        if self.template is None:
            return ()
        return (self.template,) if isinstance(self.template, str) else tuple(self.template)

    @property
    def varied(self) -> bool:
        """Whether an image's caption varies from epoch to epoch."""
        return self.shuffle_tags or len(self.templates) > 1

    def examples(self, skip_bad: bool, verify: str = STAT) -> ImageSubset:
        """The readable images; see `readable_images`."""
        style = CaptionStyle(self.templates, self.shuffle_tags, self.keep_tags)
        return ImageSubset(*readable_images(self.source, skip_bad, verify), style)

    def split(self, examples: ImageSubset, fraction: float) -> tuple[ImageSubset, ImageSubset]:
        """Split images by a hash of their names, so that adding some moves few of the others.

        All captions of an image are on one side.

        Returns:
            The images for training, and those for validation: at least one, unless ``fraction`` is 0.

        Raises:
            SettingsError: if there is one image only.
        """
        if not fraction:
            return examples, examples.select(range(0))
        assert isinstance(examples.examples, ExampleColumns)
        names, places = np.unique(examples.examples.split()[examples.indices], return_inverse=True)
        if len(names) == 1:
            raise SettingsError(
                f"data.val_fraction={fraction}: {self.source} has a single image, and none would be left for training; "
                "set data.val_fraction=0, or give other images for validation."
            )
        count = min(max(1, round(fraction * len(names))), len(names) - 1)
        return examples.select(np.flatnonzero(places >= count)), examples.select(np.flatnonzero(places < count))


def parse_source(settings: Mapping[str, Any], key: str, prompt: str | None) -> WeightedSource:
    """The source that an entry of ``data.sources`` describes.

    Args:
        settings: the entry.
        key: its name, for messages.
        prompt: one caption for the images of folders that have no ``prompt`` of their own.

    Raises:
        SettingsError: if it gives no source or several, or has a setting that its source does not take.
    """
    given = [name for name in KINDS if name in settings]
    if len(given) != 1:
        raise SettingsError(f"{key}: gives {choices(given) or 'no source'}; give exactly one of {choices(KINDS)}.")
    kind = KINDS[given[0]]
    if prompt is not None and kind is not Folder:
        raise SettingsError(
            f"data.prompt={prompt}: is a caption for folders, but {key} gives {given[0]}; leave it out, or give the "
            "entries with root a prompt of their own."
        )
    settings = settings if prompt is None else {"prompt": prompt, **settings}
    own = {field.name for field in fields(kind)} & settings.keys()
    rest = {name: value for name, value in settings.items() if name not in own}
    try:
        source = kind(**{name: settings[name] for name in own}, key=f"{key}.{given[0]}")
        return WeightedSource(source, **rest, key=key)
    except TypeError as error:
        raise SettingsError(f"{key}: cannot be used ({error}); see conf/data/mixed.yaml for what it takes.") from error


def mix_sources(sources: Sequence[ImageSubset], weights: Sequence[float]) -> JoinedImages:
    """One epoch, in which each source has its share and each image is shown at least once.

    The source with the most images for its weight shows each of them once, and so sets the length of the epoch. The
    images of the others repeat, each as often as the rest of its source, to within one.
    """
    length = max(len(examples) / weight for examples, weight in zip(sources, weights, strict=True))
    epoch = []
    for examples, weight in zip(sources, weights, strict=True):
        count = len(examples)
        times, more = divmod(round(weight * length), count)
        repeated = [np.tile(np.arange(count), times), np.arange(more) * count // max(more, 1)]
        epoch.append(examples.select(np.concatenate(repeated)))
    return JoinedImages(epoch)


def check_control_images(sources: Sequence[ImageSubset]) -> None:
    """Check that the images of all sources have control images; of one source all have one, or none has.

    Raises:
        SettingsError: if some have none.
    """
    for images in sources:
        if images[0].control is None:
            raise SettingsError(
                f"data.conditioning=files: {images[0].path} has no control image; name it in a column "
                f"conditioning_image_file_name of the metadata, or set data.conditioning=canny."
            )
