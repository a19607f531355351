"""What training images are drawn from: one place, or several mixed by weight, each with its own way with captions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import ConcatDataset, Dataset
from typing_extensions import override

from sdmodule.data.sources.folder import CaptionStyle, Example, Examples, absolute, find_examples
from sdmodule.data.sources.verify import Place, verify_images
from sdmodule.errors import SettingsError
from sdmodule.io.image_files import ImageFile
from sdmodule.ranges import check_flag, check_place


@dataclass(frozen=True)
class Folder:
    """A folder of images with captions; see `find_examples`.

    Args:
        root: the folder.
        key: the setting that gave it, for the messages.
        prompt: the caption of all its images, which then need none of their own.

    Raises:
        SettingsError: for a root or a prompt that is no text.
    """

    root: str
    key: str = "data.root"
    prompt: str | None = None

    def __post_init__(self) -> None:
        check_place(self.key, self.root)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise SettingsError(f"the prompt {self.prompt} of {self} is no text; give one caption, in quotes.")

    def __str__(self) -> str:
        return f"{self.key}={self.root}"

    def find(self) -> Examples:
        """The images, sorted by name."""
        return find_examples(self.root, self.key, self.prompt)

    def called(self, image: ImageFile) -> str:
        """Where an image is in the folder."""
        return os.path.relpath(str(image), absolute(self.root))


class ImageSubset(Dataset[Example]):
    """Some of a place's images, each looked up when it is asked for.

    Args:
        found: the place's images.
        numbers: which of them, in which order.
        style: what becomes of their captions.
        masks: whether they have their masks, if there are some.
    """

    def __init__(self, found: Examples, numbers: Sequence[int], style: CaptionStyle, masks: bool = True) -> None:
        self.found = found
        self.numbers = numbers
        self.style = style
        self.masks = masks

    def __len__(self) -> int:
        return len(self.numbers)

    @override
    def __getitem__(self, index: int) -> Example:
        example = self.found[self.numbers[index]]._replace(style=self.style)
        return example if self.masks else example._replace(mask=None)

    def part(self, positions: Sequence[int]) -> ImageSubset:
        """Some of these again, or the same several times."""
        return ImageSubset(self.found, [self.numbers[position] for position in positions], self.style, self.masks)

    def without_masks(self) -> ImageSubset:
        """These, their masks left out."""
        return ImageSubset(self.found, self.numbers, self.style, masks=False)


@dataclass(frozen=True)
class Source:
    """A place of images with captions, and how much and in which way they are shown.

    Args:
        place: where they are.
        weight: their share of what is shown, relative to the weights of other sources.
        template: the text that a caption is put into, in the place of ``{}``; of several one is drawn each time.
        shuffle_tags: put the parts of captions between commas in another order each time.
        keep_tags: how many of the first parts stay where they are.
        key: the setting that gave the source, for the messages.

    Raises:
        SettingsError: for a setting out of range.
    """

    place: Place
    weight: float = 1.0
    template: str | Sequence[str] | None = None
    shuffle_tags: bool = False
    keep_tags: int = 0
    key: str = "data"

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < 1e6:
            raise SettingsError(f"{self.key}.weight={self.weight} is not allowed; give a number over 0.")
        for template in self.templates:
            if "{}" not in str(template):
                raise SettingsError(
                    f"{self.key}.template={template} has no place for a caption; write {{}} where it goes."
                )
        check_flag(f"{self.key}.shuffle_tags", self.shuffle_tags)
        if isinstance(self.keep_tags, bool) or not isinstance(self.keep_tags, int) or self.keep_tags < 0:
            raise SettingsError(
                f"{self.key}.keep_tags={self.keep_tags} is not allowed; give a whole number, 0 or more."
            )

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates."""
        if self.template is None:
            return ()
        return (self.template,) if isinstance(self.template, str) else tuple(self.template)

    @property
    def varied(self) -> bool:
        """Whether an image has another caption at each time."""
        return self.shuffle_tags or len(self.templates) > 1

    def examples(self, skip_bad: bool) -> ImageSubset:
        """The images that can be read, each with its caption; see `verify_images`."""
        found = self.place.find()
        style = CaptionStyle(self.templates, self.shuffle_tags, self.keep_tags)
        return ImageSubset(found, verify_images(found, self.place, skip_bad), style)

    def split(self, examples: ImageSubset, fraction: float) -> tuple[ImageSubset, ImageSubset]:
        """Part the images by a hash of their names: adding some to the place moves few of the others.

        Returns:
            Those to train on, and those to validate on: at least one, unless ``fraction`` is 0.
        """
        if not fraction:
            return examples, examples.part([])
        if len(examples) == 1:
            raise SettingsError(
                f"{self.place} has one image, so data.val_fraction={fraction} leaves none to train on; set "
                "data.val_fraction=0, or give others to validate on."
            )
        count = min(max(1, round(fraction * len(examples))), len(examples) - 1)

        def name_hash(position: int) -> bytes:
            return hashlib.sha256(self.place.called(examples[position].path).encode()).digest()

        ranked = sorted(range(len(examples)), key=name_hash)
        return examples.part(sorted(ranked[count:])), examples.part(sorted(ranked[:count]))


def mix_sources(sources: Sequence[ImageSubset], weights: Sequence[float]) -> ConcatDataset[Example]:
    """An epoch in which each source has its share and each image is shown at least once.

    The source with the fewest images for its weight is the one that is repeated most; images of one source are
    shown equally often, but for one time.
    """
    length = max(len(examples) / weight for examples, weight in zip(sources, weights, strict=True))
    epoch = []
    for examples, weight in zip(sources, weights, strict=True):
        count = len(examples)
        times, more = divmod(round(weight * length), count)
        epoch.append(examples.part([*range(count)] * times + [k * count // more for k in range(more)]))
    return ConcatDataset(epoch)
