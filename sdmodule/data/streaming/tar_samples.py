"""The samples in a tar of the webdataset layout: files that share their name up to the first dot."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from sdmodule.errors import SettingsError
from sdmodule.io.image_files import SUFFIXES

MASK, CONTROL, ENCODED = ".mask", ".control", ".encoded.safetensors"
"""Suffixes of an image's other files; a mask is ``.mask.png``."""

Place = tuple[str, int, int]
"""Name, position and size of a file in a tar."""


class SampleFiles(NamedTuple):
    """Where the files of one sample are."""

    image: Place
    caption: Place
    mask: Place | None = None
    control: Place | None = None
    encoded: Place | None = None


def read_samples(tar: tarfile.TarFile, skip_bad: bool) -> Iterator[SampleFiles]:
    """The samples of a tar in their order; files that are no part of an image with a caption are passed over.

    Args:
        tar: the open tar, of which only headers are read.
        skip_bad: pass over images without a caption.

    Raises:
        SettingsError: for an image without a caption or two images of one name.
        tarfile.TarError: if it is truncated.
        OSError: likewise.
    """
    stem: str | None = None
    files: dict[str, Place] = {}
    for member in tar:
        folder, slash, base = member.name.rpartition("/")
        if not member.isreg() or base.startswith("."):  # hidden, as macOS puts beside each file
            continue
        name, dot, suffix = base.partition(".")
        if (own := folder + slash + name) != stem:
            yield from _sample(files, skip_bad)
            stem, files = own, {}
        files[dot + suffix.lower()] = (member.name, member.offset_data, member.size)
    yield from _sample(files, skip_bad)


def _sample(files: dict[str, Place], skip_bad: bool) -> Iterator[SampleFiles]:
    """The sample of some files, if they are one."""
    images = [files[kind] for kind in sorted(SUFFIXES & files.keys())]
    if not images:
        return
    caption = files.get(".txt") or files.get(".json")
    if caption is None or len(images) > 1:
        if skip_bad:
            return
        problem = "has no caption" if caption is None else f"and {images[1][0]} have the same name"
        raise SettingsError(
            f"{images[0][0]} {problem}; put one .txt or .json of the same name beside each image, or set "
            "data.skip_bad=true."
        )
    mask, control = (_image_called(kind, files) for kind in (MASK, CONTROL))
    yield SampleFiles(images[0], caption, mask, control, files.get(ENCODED))


def _image_called(kind: str, files: dict[str, Place]) -> Place | None:
    return next((files[kind + end] for end in sorted(SUFFIXES) if kind + end in files), None)


class OpenShard:
    """A shard on local disk; its file is closed when nothing refers to it any more.

    Args:
        file: the shard.
        key: name of the setting that gave the set, for messages.
        name: its address, for messages.
        digest: its fingerprint, if that is known.
        skip_bad: pass over images without a caption.

    Raises:
        SettingsError: if it cannot be read.
    """

    def __init__(self, file: BinaryIO, key: str, name: str, digest: str, skip_bad: bool) -> None:
        self.file = file
        self.key = key
        self.name = name
        self.digest = digest
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                self.samples = list(read_samples(tar, skip_bad))
        except (tarfile.TarError, OSError) as error:
            raise SettingsError(
                f"{key}={name}: cannot be read ({error}); give complete, uncompressed tar files."
            ) from error
        except SettingsError as error:
            raise SettingsError(f"{key}={name}: {error}") from error

    def read(self, place: Place) -> bytes:
        """The bytes of a file in it.

        Raises:
            OSError: if the tar ends before the file does.
        """
        name, offset, size = place
        content = b""
        while len(content) < size and (
            more := os.pread(self.file.fileno(), size - len(content), offset + len(content))
        ):
            content += more
        if len(content) < size:
            raise OSError(f"{self.name} ends within {name}")
        return content


class StreamedFile(NamedTuple):
    """An image in a shard."""

    shard: OpenShard
    place: Place

    def read(self) -> bytes:
        """The bytes of the image."""
        return self.shard.read(self.place)

    def identity(self) -> str:
        """Address and fingerprint of the shard, and the place in it."""
        return f"{self.shard.name} {self.shard.digest} {self.place[1]} {self.place[2]}"

    def __str__(self) -> str:
        return f"{self.shard.name.rpartition('/')[2]}/{self.place[0]}"


def read_caption(shard: OpenShard, sample: SampleFiles, key: str) -> tuple[str, dict[str, Any]]:
    """The caption of a sample, and what else its ``.json`` holds.

    Args:
        shard: where it is.
        sample: its files.
        key: key of the caption in a ``.json``.

    Raises:
        SettingsError: if the file cannot be read or has no caption.
    """
    name = f"the caption {shard.name.rpartition('/')[2]}/{sample.caption[0]}"
    try:
        text = shard.read(sample.caption).decode("utf-8-sig")
        if not sample.caption[0].lower().endswith(".json"):
            return text.strip(), {}
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{shard.key}: {name} cannot be read ({error}); replace it by UTF-8 text or JSON."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        held = f"only {', '.join(sorted(content))}" if isinstance(content, dict) else "and is not an object"
        raise SettingsError(
            f"data.caption_key={key}: {name} has no string under this key, {held}; give the key of the captions."
        )
    return content[key], content
