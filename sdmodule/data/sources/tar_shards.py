"""Images in tar shards, as the package webdataset writes them: what belongs together has one name but for its end.

The members' places are read once, so that any image is found at once. So shards are shuffled, mixed, cut into
batches of one size, cached and gone on from as folders are, and every device has its equal part of every batch, which
a stream of shards cannot give.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.data.sources.folder import Example, Examples, some
from sdmodule.errors import SettingsError, choices
from sdmodule.io.image_files import SUFFIXES, ImageFile
from sdmodule.ranges import check_place


class Member(NamedTuple):
    """A file in a tar."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.shard.name}/{self.name}"


@dataclass(frozen=True)
class Shards:
    """Tar files of images, each with a ``.txt`` or a ``.json`` of its name that holds its caption.

    Args:
        shards: a path with ``{000..009}``, ``{a,b}`` or ``*`` in it, or several.
        caption_key: which value of a ``.json`` is the caption; where there is a ``.txt`` too, it is that.
        key: the setting that gave it, for the messages.

    Raises:
        SettingsError: for a path that is no text.
    """

    shards: str | Sequence[str]
    caption_key: str = "caption"
    key: str = "data.shards"

    def __post_init__(self) -> None:
        several = isinstance(self.shards, Sequence) and not isinstance(self.shards, str)
        for one in self.shards if several else [self.shards]:
            check_place(self.key, one)

    def __str__(self) -> str:
        return f"{self.key}={self.shards}"

    def find(self) -> Examples:
        """The images, in the order of the shards and of what is in them."""
        pairs: list[tuple[Member, Member]] = []
        bare: list[Member] = []
        others: Counter[str] = Counter()
        for shard in self.files():
            for files in _samples(shard, str(self)):
                images = [files.pop(kind) for kind in sorted(SUFFIXES & files.keys())]
                caption = files.pop(".txt", None) or files.pop(".json", None)
                if len(images) > 1:
                    raise SettingsError(f"{self} has {images[0]} and {images[1]} of one name; keep one of them.")
                if images and caption:
                    pairs.append((images[0], caption))
                    files.pop(".json", None)
                else:
                    bare += images
                others.update(files.keys())
        if bare:
            raise SettingsError(
                f"{self} has {len(bare)} images without a caption: {some([*map(str, bare)])}; put a .txt or a .json "
                "of the same name beside each."
            )
        if not pairs:
            raise SettingsError(f"{self} holds no images; images end in {choices(SUFFIXES)}.")
        if others:
            kinds = choices(f"{count} {kind or 'without an end'}" for kind, count in others.items())
            rank_zero_warn(f"{self}: left out files that are neither image nor caption: {kinds}.")
        return _Pairs(pairs, self)

    def files(self) -> list[Path]:
        """The shards' files.

        Raises:
            SettingsError: if one does not exist.
        """
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        paths: list[Path] = []
        for pattern in patterns:
            for text in braces(str(Path(pattern).expanduser())):
                found = sorted(map(Path, glob.glob(text)))
                if not found:
                    raise SettingsError(f"{self} names {text}, which does not exist; give local .tar files.")
                paths += found
        if not paths:
            raise SettingsError(f"{self} names no files; give a path such as shards/{{000..009}}.tar.")
        return paths

    def called(self, image: ImageFile) -> str:
        """The shard and what the image is called in it."""
        return str(image)

    def caption(self, file: Member) -> str:
        """The caption that a ``.txt`` or a ``.json`` holds.

        Raises:
            SettingsError: if it holds none.
        """
        try:
            text = file.read().decode("utf-8-sig")
            if not file.name.lower().endswith(".json"):
                return text.strip()
            content = json.loads(text)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{self}: the caption {file} cannot be read ({error}); write it anew.") from error
        if not isinstance(content, dict) or not isinstance(caption := content.get(self.caption_key), str):
            held = choices(map(str, content)) if isinstance(content, dict) else "no names"
            raise SettingsError(
                f"{self}: {file} has no text under {self.caption_key}, only {held}; name the caption with "
                "data.caption_key."
            )
        return caption


class _Pairs:
    """Images and captions in shards, read when they are asked for."""

    def __init__(self, pairs: Sequence[tuple[Member, Member]], shards: Shards) -> None:
        self.pairs = pairs
        self.shards = shards

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        image, caption = self.pairs[index]
        return Example(image, self.shards.caption(caption))


def _samples(shard: Path, given: str) -> list[dict[str, Member]]:
    """The files of a shard by what they belong to, each under its end from the first dot on, in small letters."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                if member.isdir() or base.startswith("."):  # hidden, such as macOS puts beside each file
                    continue
                stem, dot, suffix = base.partition(".")
                if not member.isreg():
                    suffix += " (link)"
                sample = samples.setdefault(folder + slash + stem, {})
                if (kind := dot + suffix.lower()) in sample:
                    raise SettingsError(f"{given}: {shard} has two files {member.name}; keep one of them.")
                sample[kind] = Member(shard, member.name, member.offset_data, member.size)
            if any(Member(shard, "", tar.offset, tarfile.BLOCKSIZE).read() or b"no end"):
                raise tarfile.ReadError("it ends in the middle")  # tarfile itself takes a broken header for the end
    except (tarfile.TarError, OSError) as error:
        raise SettingsError(
            f"{given}: {shard} cannot be read ({error}); give whole tar files, without compression."
        ) from error
    return list(samples.values())


def braces(pattern: str) -> list[str]:
    """What a pattern stands for: ``{000..009}`` for numbers in as many digits, ``{a,b}`` for each of several texts."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        choice = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choice = group[1].split(",")
    return [text for one in choice for text in braces(pattern[: group.start()] + one + pattern[group.end() :])]
