"""Reading images of any source: which files are readable, and what their pixels are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sdmodule.data.index.columns import ExampleColumns, numbers, same_columns
from sdmodule.data.index.index_file import SourceIndex, index_of
from sdmodule.data.index.recall import Learned, recall
from sdmodule.data.sources.folder import some
from sdmodule.data.sources.plain import ListedExamples, NoIndex, PlainSource
from sdmodule.errors import SettingsError, choices, count_of
from sdmodule.io.fingerprint import SIZE, file_fingerprint
from sdmodule.io.image_files import FORMATS, SUFFIXES, ImageFile, open_image, open_upright, upright_size_of
from sdmodule.io.progress import LONG_TASK, progress
from sdmodule.io.transparency import on_white

STAT, CONTENTS = VERIFICATIONS = ("stat", "content")
"""How changed files are noticed: by size and date, or by their contents."""

AT_ONCE = 1024
"""Images that are given to the threads at a time."""

SAVED_EVERY = 60.0
"""Seconds after which what was read is kept while the rest is still to be read."""


@runtime_checkable
class ImageSource(Protocol):
    """Where captioned images are stored, and what is kept of them for later starts.

    ``str`` gives its setting as ``key=value``.
    """

    @property
    def key(self) -> str:
        """Name of the setting that gave it."""
        ...

    def place(self) -> tuple[object, ...]:
        """What identifies the source, wherever a run is started."""
        ...

    def find(self, known: pa.Table | None = None) -> ExampleColumns:
        """All images with their captions, always in the same order.

        Args:
            known: what an earlier start has found; what has not changed since is taken from it.

        Raises:
            SettingsError: if there are none, or one has no caption.
        """
        ...

    def held(self, known: pa.Table) -> ExampleColumns:
        """The images that columns name, without a look for changes."""
        ...

    def name_of(self, image: ImageFile) -> str:
        """The name of an image within the source."""
        ...


class Read(NamedTuple):
    """What reading the files of one example shows.

    Attributes:
        problems: what is wrong with each file that cannot be used, by its name.
        size: width and height of the image, upright; 0 if one of the files cannot be used.
        content: the fingerprint of the image's bytes.
    """

    problems: dict[str, str]
    size: tuple[int, int] = (0, 0)
    content: bytes = bytes(SIZE)


def readable_images(
    source: ImageSource | PlainSource, skip_bad: bool, verify: str = STAT
) -> tuple[ExampleColumns, NDArray[np.int64]]:
    """The images of a source, and the positions of those that can be decoded, their masks and control images too.

    Every file is decoded once. What that shows is kept in an index in the user's cache folder, from which later starts
    take what has not changed since. Of the processes of a run one reads, and the others take what it has found.

    Args:
        source: the source.
        skip_bad: leave unreadable images out, with one warning that names them and says why.
        verify: ``stat`` takes a file of the same size and date for unchanged; ``content`` compares all contents.

    Raises:
        SettingsError: if an image is unreadable and ``skip_bad`` is false, or if none is readable.
    """
    examples, problems = _known_images(source, verify)
    pa.default_memory_pool().release_unused()  # what comparing the columns took
    good = np.flatnonzero(numbers(examples.table, "width") > 0)
    if not problems:
        return examples, good
    told = [f"{name} ({problem})" for name, problem in problems.items()]
    if not skip_bad:
        raise SettingsError(
            f"{source}: {count_of(len(problems), 'unreadable image')}: {some(told)}; replace them, or set "
            "data.skip_bad=true to leave them out."
        )
    if not len(good):
        raise SettingsError(
            f"{source}: no readable image is left after skipping {some(told)}; give a source with some."
        )
    rank_zero_warn(f"{source.key}: skipped {count_of(len(problems), 'unreadable image')}: {some(told, limit=20)}.")
    return examples, good


def _known_images(source: ImageSource | PlainSource, verify: str) -> tuple[ExampleColumns, dict[str, str]]:
    """The images of a source with all columns, and what is wrong with each unreadable file, by its name."""
    if not isinstance(source, ImageSource):
        return _learn(ListedExamples(source), NoIndex(), source, verify)
    with index_of(*source.place()) as index:
        if index.fresh and index.table is not None:
            examples = source.held(index.table).replaced(index.table, index.file)
            return examples, _problems_of_unread(examples, source)
        examples, problems = _learn(source.find(index.table), index, source, verify)
        index.note_checked(examples.table)
        return examples, problems


def _learn(
    found: ExampleColumns, index: SourceIndex | NoIndex, source: ImageSource | PlainSource, verify: str
) -> tuple[ExampleColumns, dict[str, str]]:
    """Read the images that are not known, and keep in the index what they show.

    Returns:
        The examples with all columns, and what is wrong with each unreadable file, by its name.
    """
    known = None if index.table is None else found.replaced(index.table)
    learned = recall(found, known, compare_all=verify == CONTENTS)
    problems: dict[str, str] = {}
    saved = time.monotonic()
    for row, read in _read_all(found, np.flatnonzero(learned.size[:, 0] == 0), source, learned):
        problems |= read.problems
        learned.size[row] = read.size
        learned.content[row] = np.frombuffer(read.content, np.uint8)
        if time.monotonic() - saved > SAVED_EVERY:  # what a killed process has read is not lost
            index.save(learned.written_to(found, index.began))
            saved = time.monotonic()
    table = learned.written_to(found, index.began)
    if isinstance(index, SourceIndex) and index.table is not None and not learned.suspects:
        if same_columns(table, index.table):
            return found.replaced(index.table, index.file), problems
    return found.replaced(*index.save(table)), problems


def _read_all(
    examples: ExampleColumns, rows: NDArray[np.int64], source: ImageSource | PlainSource, learned: Learned
) -> Iterator[tuple[int, Read]]:
    """Read images in several threads, a part of them at a time."""
    with (
        progress(len(rows), f"{source.key}: checking images, once", delay=LONG_TASK) as on_done,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE].tolist()
            for row, read in zip(part, pool.map(lambda row: _read(examples, row, source, learned), part), strict=True):
                yield row, read
                on_done(1)


def _read(examples: ExampleColumns, row: int, source: ImageSource | PlainSource, learned: Learned) -> Read:
    """Read the files of an example; one with the content that it had is not decoded again."""
    example = examples[row]
    try:
        if row in learned.suspects:
            content = bytes.fromhex(file_fingerprint(example.path))
            if content == learned.content[row].tobytes():
                return Read({}, learned.suspects[row], content)
    except Exception:  # decoding says what is wrong with it
        pass
    sizes = []
    problems: dict[str, str] = {}
    for file in example.files:
        try:
            sizes.append(_size(file))
        except UnidentifiedImageError:  # its own message names an object in memory
            problems[source.name_of(file)] = f"not one of {choices(FORMATS)}"
        except Exception as error:  # PIL's plugins raise many kinds: OSError, SyntaxError, struct.error, bomb errors
            problems[source.name_of(file)] = str(error)
    if problems:
        return Read(problems)
    return Read({}, sizes[0], bytes.fromhex(file_fingerprint(example.path)))


def _size(file: ImageFile) -> tuple[int, int]:
    """Width and height of an image, upright; its pixels are decoded.

    Raises:
        Exception: of many kinds, if it cannot be used.
    """
    if isinstance(file, Path) and file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{file.suffix or 'no suffix'} is not one of {choices(SUFFIXES)}")
    with open_image(file) as image:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range")
        size = upright_size_of(image)
        image.load()
    return size


def _problems_of_unread(examples: ExampleColumns, source: ImageSource) -> dict[str, str]:
    """What is wrong with the files that another process of this run could not use."""
    problems: dict[str, str] = {}
    for row in np.flatnonzero(numbers(examples.table, "width") == 0).tolist():
        read = _read(examples, row, source, Learned(np.zeros((0, 2), np.int32), np.zeros((0, SIZE), np.uint8)))
        problems |= read.problems or {source.name_of(examples[row].path): "it could not be read a moment ago"}
    return problems


def load_image(path: ImageFile) -> Image.Image:
    """An image of 8 bits in its own mode: upright, 16 bits scaled to 8, the first frame only.

    Raises:
        SettingsError: if its pixels cannot be decoded, or are more than PIL's limit.
    """
    try:
        return open_upright(path)
    except MemoryError as error:
        raise SettingsError(f"data: {path} is too large for the memory; make it smaller, or remove it.") from error
    except Exception as error:
        raise SettingsError(f"data: {path} cannot be decoded ({error}); replace or remove it.") from error


def load_rgb(path: ImageFile) -> Image.Image:
    """An image as 8-bit RGB, transparency on white; see `load_image`."""
    return on_white(load_image(path))


def load_beside(path: ImageFile, image: ImageFile, size: tuple[int, int], what: str) -> Image.Image:
    """The mask or control image of an image, in its own mode.

    Args:
        path: its file.
        image: the file of the image that it belongs to, for the message.
        size: width and height of that image.
        what: what it is, for the message.

    Raises:
        SettingsError: if its pixels cannot be decoded, or its size differs from the image's.
    """
    beside = load_image(path)
    if beside.size != size:
        raise SettingsError(
            f"data: the {what} {path} has {beside.width}x{beside.height} pixels, but {image} has {size[0]}x{size[1]}; "
            f"give a {what} of the image's size."
        )
    return beside
