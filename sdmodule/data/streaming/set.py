"""A streamed set: where it is, its index, and its samples one by one."""

from __future__ import annotations

import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from sdmodule.data.sources.path_patterns import expand_braces
from sdmodule.data.streaming.index import INDEX, Samples, ShardIndex, parse_index
from sdmodule.data.streaming.remote import Remote, is_local, local_path
from sdmodule.data.streaming.shard_cache import FetchAhead, Shard, ShardCache, locked
from sdmodule.data.streaming.tar_samples import OpenShard, SampleFiles, read_samples
from sdmodule.errors import SettingsError, check_path
from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.fingerprint import fingerprint
from sdmodule.io.progress import progress

INDEXERS = 8
"""Shards without an index that are read at the same time."""

PACKED_CAPTION = "caption"
"""Key of the caption in the ``.json`` of a packed set."""


@dataclass(frozen=True)
class StreamSource:
    """Where a set is.

    Args:
        url: folder that `sdmodule.data.pack` wrote; or ``.tar`` files, which may contain ``{000..009}``, ``{a,b}`` or
            ``*``, or several of these.
        key: name of the setting that gave it, for messages.
        caption_key: key of the caption in a ``.json``.
        skip_bad: pass over images without a caption.

    Raises:
        SettingsError: for an address that is no string.
    """

    url: str | Sequence[str]
    key: str = "data.url"
    caption_key: str = PACKED_CAPTION
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for one in self.addresses:
            check_path(self.key, one)

    def __str__(self) -> str:
        return f"{self.key}={self.url}"

    @property
    def addresses(self) -> list[Any]:
        """What was given, as a list."""
        return [self.url] if isinstance(self.url, str) or not isinstance(self.url, Sequence) else list(self.url)

    @property
    def packed(self) -> bool:
        """Whether it is a folder with an index, not tars."""
        return len(self.addresses) == 1 and ".tar" not in _file_name(str(self.addresses[0]))

    def read_index(self, cache_folder: Path) -> ShardIndex:
        """The index; of tars without one it is made, once, and kept in the cache folder.

        Raises:
            SettingsError: if anything cannot be read.
        """
        remote = Remote(self.key)
        if not self.packed:
            return self._index_of_tars(remote, cache_folder)
        address = str(self.addresses[0]).rstrip("/")
        try:
            text = remote.read(f"{address}/{INDEX}")
        except SettingsError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise SettingsError(
                f"{self}: has no {INDEX}; give a folder that python -m sdmodule.data.pack wrote, or the addresses of "
                ".tar files."
            ) from error
        return parse_index(text, str(self))

    def shard(self, index: ShardIndex, number: int) -> Shard:
        """A shard of the set."""
        name = index.names[number]
        url = f"{str(self.addresses[0]).rstrip('/')}/{name}" if self.packed else name
        return Shard(url, int(index.bytes[number]), index.digests[number])

    def _index_of_tars(self, remote: Remote, cache_folder: Path) -> ShardIndex:
        urls = [url for one in self.addresses for url in self._expanded(str(one), remote)]
        if not urls:
            raise SettingsError(f"{self}: names no files; give an address such as https://host/{{000..009}}.tar.")
        file = cache_folder / f"index-{fingerprint(self.skip_bad, *urls)}.json"
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
            with locked(file.with_suffix(".lock")):  # the other processes of this machine wait
                if file.is_file():
                    return parse_index(file.read_bytes(), f"{self}: {file}")
                index = self._make_index(urls, remote)
                atomic_write_text(file, index.text())
                return index
        except OSError as error:
            raise SettingsError(
                f"data.cache_folder={cache_folder}: cannot be written ({error.strerror or error}); choose a folder "
                "that can."
            ) from error

    def _expanded(self, url: str, remote: Remote) -> list[str]:
        found = []
        for one in expand_braces(url):
            matching = remote.matching(one) if "*" in one else [one]
            if not matching:
                raise SettingsError(f"{self}: {one} matches no file; check the address.")
            found += matching
        return found

    def _make_index(self, urls: Sequence[str], remote: Remote) -> ShardIndex:
        records: list[dict[str, Any]] = []
        with (
            progress(len(urls), f"{self}: has no index; reading all shards once to make one") as on_done,
            ThreadPoolExecutor(INDEXERS) as pool,
        ):
            for record in pool.map(lambda url: self._record(url, remote), urls):
                records.append(record)
                on_done(1)
        kept = [record for record in records if record["samples"]]
        if not kept:
            raise SettingsError(f"{self}: contains no images with captions; give tars of the webdataset layout.")
        held = {kind: all(record[kind] for record in kept) for kind in ("masks", "controls")}
        return ShardIndex.of(kept, **held)

    def _record(self, url: str, remote: Remote) -> dict[str, Any]:
        """What the index holds of a tar, which is read from front to back."""
        masks = controls = True
        count = 0
        try:
            with remote.open(url) as opened:
                counted = _Counted(opened)
                with tarfile.open(fileobj=counted, mode="r|") as tar:  # type: ignore[call-overload]
                    for sample in read_samples(tar, self.skip_bad):
                        count += 1
                        masks, controls = masks and sample.mask is not None, controls and sample.control is not None
                while counted.read(2**20):
                    pass
        except SettingsError as error:
            raise error if str(error).startswith(self.key) else SettingsError(f"{self.key}={url}: {error}") from error
        except Exception as error:  # of tarfile, or of the connection
            raise SettingsError(
                f"{self.key}={url}: cannot be read ({error}); give complete, uncompressed tar files."
            ) from error
        return {"name": url, "samples": count, "bytes": counted.bytes, "masks": masks, "controls": controls}


def _file_name(url: str) -> str:
    """The last part of an address, without a signature behind it."""
    return url.partition("?")[0].rstrip("/").rpartition("/")[2]


class _Counted:
    """A stream that counts what is read of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(size)
        self.bytes += len(content)
        return content


class StreamedSample(NamedTuple):
    """A sample and the shard that holds it."""

    shard: OpenShard
    files: SampleFiles


class ShardReader:
    """Reads samples of a set from local disk; a shard that is not there is fetched.

    Args:
        source: where the set is.
        index: its index.
        cache: where shards are kept; unused for a set on a local disk.
        keep: how many shards stay open.
    """

    def __init__(self, source: StreamSource, index: ShardIndex, cache: ShardCache, keep: int) -> None:
        self.source = source
        self.index = index
        self.cache = cache
        self.keep = keep
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()  # the most recently used last

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def sample(self, shard: int, number: int) -> StreamedSample:
        """A sample by its shard and its number there.

        Raises:
            SettingsError: if the shard cannot be read, or has other samples than the index says.
        """
        if self._pid != os.getpid():  # a loading process has its own files, or a shard would stay locked for long
            self._reset()
        with self._lock:
            opened = self._open.pop(shard, None) or self._opened(shard)
            self._open[shard] = opened
            if len(self._open) > self.keep:
                self._open.popitem(last=False)
        return StreamedSample(opened, opened.samples[number])

    def _opened(self, number: int) -> OpenShard:
        shard = self.source.shard(self.index, number)
        if is_local(shard.url):
            file = self._local(shard)
        else:
            file = self.cache.open(shard)
        opened = OpenShard(file, self.source.key, shard.url, shard.digest, self.source.skip_bad)
        if len(opened.samples) != self.index.samples[number]:
            raise SettingsError(
                f"{self.source.key}={shard.url}: has {len(opened.samples):,} samples, and the index says "
                f"{self.index.samples[number]:,}; pack the set again, or, of tars without an index, delete its "
                f"index-*.json in data.cache_folder={self.cache.folder}."
            )
        return opened

    def _local(self, shard: Shard) -> Any:
        path = local_path(shard.url)
        try:
            file = path.open("rb")
        except OSError as error:
            raise SettingsError(
                f"{self.source.key}={path}: cannot be read ({error.strerror}); check the path."
            ) from error
        if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
            raise SettingsError(
                f"{self.source.key}={path}: has {size:,} bytes instead of {shard.bytes:,}: it is truncated, or not the "
                "one that was indexed; copy it again."
            )
        return file

    def fetch_ahead(self, samples: Samples) -> Any:
        """A function that fetches shards soon, by their positions in ``samples``; None for a set on a local disk."""
        if is_local(self.source.shard(self.index, 0).url):
            return None
        ahead = FetchAhead(self.cache)

        def fetch(positions: np.ndarray) -> None:
            ahead([self.source.shard(self.index, int(samples.shards[position])) for position in positions])

        return fetch
