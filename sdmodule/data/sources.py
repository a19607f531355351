"""Where training pictures come from: one folder, or several mixed by weight, each with its own way with captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sdmodule.data.captions import CaptionStyle, Example, absolute, find_examples
from sdmodule.data.readable import keep_readable
from sdmodule.errors import SettingsError


@dataclass(frozen=True)
class Source:
    """A folder of pictures with captions.

    Args:
        root: the folder.
        weight: its share of what is shown, relative to the weights of other sources.
        template: the text that a caption is put into, in the place of ``{}``.
        shuffle_tags: put the parts of captions between commas in another order each time.
        keep_tags: how many of the first parts stay where they are.
        key: the setting that gave the source, for the messages.

    Raises:
        SettingsError: for a setting out of range.
    """

    root: str
    weight: float = 1.0
    template: str | None = None
    shuffle_tags: bool = False
    keep_tags: int = 0
    key: str = "data.root"

    def __post_init__(self) -> None:
        place = self.key.removesuffix(".root")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not 0 < self.weight < 1e6:
            raise SettingsError(f"{place}.weight={self.weight} is not allowed; give a number over 0.")
        if self.template is not None and "{}" not in str(self.template):
            raise SettingsError(
                f"{place}.template={self.template} has no place for a caption; write {{}} where it goes."
            )
        if isinstance(self.keep_tags, bool) or not isinstance(self.keep_tags, int) or self.keep_tags < 0:
            raise SettingsError(f"{place}.keep_tags={self.keep_tags} is not allowed; give a whole number, 0 or more.")

    def examples(self, skip_bad: bool) -> list[Example]:
        """The folder's pictures, each with its caption; see `find_examples` and `keep_readable`."""
        style = CaptionStyle(self.template, self.shuffle_tags, self.keep_tags)
        found = keep_readable(find_examples(self.root, self.key), absolute(self.root), skip_bad, self.key)
        return [example._replace(style=style) for example in found]

    def split(self, examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
        """Part the pictures by a hash of their names: adding some to the folder moves few of the others.

        Returns:
            Those to train on, and those to validate on: at least one, unless ``fraction`` is 0.
        """
        if not fraction:
            return list(examples), []
        if len(examples) == 1:
            raise SettingsError(
                f"{self.key}={self.root} has one picture, so data.val_fraction={fraction} leaves none to train on; set "
                "data.val_fraction=0, or give data.val_root."
            )
        count = min(max(1, round(fraction * len(examples))), len(examples) - 1)
        folder = absolute(self.root)

        def name_hash(example: Example) -> bytes:
            return hashlib.sha256(example.path.relative_to(folder).as_posix().encode()).digest()

        ranked = sorted(examples, key=name_hash)
        train, val = (sorted(part, key=lambda example: example[:2]) for part in (ranked[count:], ranked[:count]))
        return train, val


def mixed(sources: Sequence[Sequence[Example]], weights: Sequence[float]) -> list[Example]:
    """An epoch in which each source has its share and each picture is shown at least once.

    The source with the fewest pictures for its weight is the one that is repeated most; pictures of one source are
    shown equally often, but for one time.
    """
    length = max(len(examples) / weight for examples, weight in zip(sources, weights, strict=True))
    epoch: list[Example] = []
    for examples, weight in zip(sources, weights, strict=True):
        times, more = divmod(round(weight * length), len(examples))
        epoch += [*examples] * times + [examples[k * len(examples) // more] for k in range(more)]
    return epoch
