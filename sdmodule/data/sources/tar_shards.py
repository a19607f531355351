"""Images in tar shards of the webdataset layout: the files of one sample share their name up to the first dot.

The positions of all members are read once, after which any image can be read directly. So shards are shuffled, mixed,
bucketed, cached and resumed as folders are, and every device has an equal part of every batch, which streaming
shards cannot give.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from sdmodule.data.example import Example, Examples
from sdmodule.data.sources.folder import some
from sdmodule.errors import SettingsError, check_path, choices
from sdmodule.io.image_files import SUFFIXES, ImageFile
from sdmodule.io.progress import LONG_TASK, progress


class Member(NamedTuple):
    """A file in a tar."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            OSError: if the tar ends before the file does.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.shard} is cut off")
        return content

    def identity(self) -> str:
        """Path, size and date of the shard, and the place in it."""
        status = self.shard.stat()
        return f"{self.shard} {status.st_size} {status.st_mtime_ns} {self.offset} {self.size}"

    def __str__(self) -> str:
        return f"{self.shard.name}/{self.name}"


@dataclass(frozen=True)
class Shards:
    """Tar files of images, each with its caption in a ``.txt`` or a ``.json`` of the same name.

    Args:
        shards: a path, which may contain ``{000..009}``, ``{a,b}`` or ``*``, or several.
        caption_key: key of the caption in a ``.json``; where there is a ``.txt`` too, that is the caption.
        key: name of the setting that gave it, for messages.

    Raises:
        SettingsError: for a path that is no string.
    """

    shards: str | Sequence[str]
    caption_key: str = "caption"
    key: str = "data.shards"

    def __post_init__(self) -> None:
        several = isinstance(self.shards, Sequence) and not isinstance(self.shards, str)
        for pattern in self.shards if several else [self.shards]:
            check_path(self.key, pattern)

    def __str__(self) -> str:
        return f"{self.key}={self.shards}"

    def find(self) -> Examples:
        """The images, in the order of the shards and of their members.

        Raises:
            SettingsError: if a shard cannot be read, an image has no caption, or there are no images.
        """
        pairs: list[tuple[Member, Member]] = []
        bare: list[Member] = []
        others: Counter[str] = Counter()
        for files in self._indexed():
            images = [files.pop(kind) for kind in sorted(SUFFIXES & files.keys())]
            caption = files.pop(".txt", None) or files.pop(".json", None)
            if len(images) > 1:
                raise SettingsError(f"{self}: {images[0]} and {images[1]} have the same name; keep one of them.")
            if images and caption:
                pairs.append((images[0], caption))
                files.pop(".json", None)
            else:
                bare += images
            others.update(files.keys())
        if bare:
            raise SettingsError(
                f"{self}: images without a caption: {some([*map(str, bare)])}; put a .txt or a .json of the "
                "same name beside each."
            )
        if not pairs:
            raise SettingsError(f"{self}: contains no images; images end in {choices(SUFFIXES)}.")
        if others:
            kinds = choices(f"{count} {kind or 'without a suffix'}" for kind, count in others.items())
            rank_zero_warn(f"{self}: left out files that are neither image nor caption: {kinds}.")
        return _MemberExamples(pairs, self)

    def _indexed(self) -> Iterator[dict[str, Member]]:
        """The samples of all shards, each a dictionary of its files; see `_samples`."""
        shards = self.files()
        with progress(len(shards), f"{self.key}: indexing shards", delay=LONG_TASK) as on_done:
            for shard in shards:
                yield from _samples(shard, str(self))
                on_done(1)

    def files(self) -> list[Path]:
        """Paths of the shards.

        Raises:
            SettingsError: if one does not exist.
        """
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        paths: list[Path] = []
        for pattern in patterns:
            folder, rest = existing_part(Path(pattern).expanduser())
            for expanded in expand_braces(rest):
                path = folder / expanded
                found = (
                    [path] if path.exists() else sorted(folder / name for name in glob.glob(expanded, root_dir=folder))
                )
                if not found:
                    raise SettingsError(f"{self}: {path} does not exist; give local .tar files.")
                paths += found
        if not paths:
            raise SettingsError(f"{self}: names no files; give a path such as shards/{{000..009}}.tar.")
        return paths

    def name_of(self, image: ImageFile) -> str:
        """The name of the shard, and the image's name in it."""
        return str(image)

    def caption(self, file: Member) -> str:
        """The caption in a ``.txt`` or a ``.json``.

        Raises:
            SettingsError: if the file cannot be read or has none.
        """
        try:
            text = file.read().decode("utf-8-sig")
            if not file.name.lower().endswith(".json"):
                return text.strip()
            content = json.loads(text)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{self}: the caption {file} cannot be read ({error}); replace it by UTF-8 text or JSON."
            ) from error
        if not isinstance(content, dict) or not isinstance(caption := content.get(self.caption_key), str):
            keys = f"only {choices(map(str, content))}" if isinstance(content, dict) else "and is not an object"
            raise SettingsError(
                f"{self} caption_key={self.caption_key}: {file} has no string under this key, {keys}; give the key of "
                "the captions."
            )
        return caption


class _MemberExamples:
    """Images and captions in shards, read when they are needed."""

    def __init__(self, pairs: Sequence[tuple[Member, Member]], shards: Shards) -> None:
        self.pairs = pairs
        self.shards = shards

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        image, caption = self.pairs[index]
        return Example(image, self.shards.caption(caption))


def _samples(shard: Path, given: str) -> list[dict[str, Member]]:
    """The samples of a shard, each a dictionary of its files by their suffix, from the first dot on, in lower case."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                if member.isdir() or base.startswith("."):  # hidden, as macOS puts beside each file
                    continue
                stem, dot, suffix = base.partition(".")
                if not member.isreg():
                    suffix += " (link)"
                sample = samples.setdefault(folder + slash + stem, {})
                if (kind := dot + suffix.lower()) in sample:
                    raise SettingsError(f"{given}: {shard} contains {member.name} twice; keep one of them.")
                sample[kind] = Member(shard, member.name, member.offset_data, member.size)
            if any(Member(shard, "", tar.offset, tarfile.BLOCKSIZE).read() or b"no end"):
                raise tarfile.ReadError("it is truncated")  # tarfile itself takes a corrupt header for the end
    except (tarfile.TarError, OSError) as error:
        raise SettingsError(
            f"{given}: {shard} cannot be read ({error}); give complete, uncompressed tar files."
        ) from error
    return list(samples.values())


def existing_part(path: Path) -> tuple[Path, str]:
    """The longest part of a path that exists, letter for letter, and the rest, which is a pattern.

    So a folder that is called ``set[1]`` or ``a{b}`` is that folder, and no other.
    """
    for folder in (path, *path.parents):
        if folder.exists():
            return folder, "" if folder == path else str(path.relative_to(folder))
    return Path(path.anchor or "."), str(path)


def expand_braces(pattern: str) -> list[str]:
    """The strings that a pattern stands for, as in a shell: ``{000..009}`` counts, ``{a,b}`` gives each alternative."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        options = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = group[1].split(",")
    return [text for one in options for text in expand_braces(pattern[: group.start()] + one + pattern[group.end() :])]
