"""The index of a streamed set: its shards, the number of samples in each, and what the samples hold.

Shards are tars of the webdataset layout, so other tools read them too. The index is one JSON file in columns. It and
what is made of it grow with the number of shards, not with that of samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from sdmodule.data.buckets import Size
from sdmodule.errors import SettingsError
from sdmodule.io.fingerprint import fingerprint

INDEX = "index.json"
FORMAT = "sdmodule shards 1"
"""Name and version of the format, in every index."""


@dataclass(frozen=True)
class Encoded:
    """What the samples of a set hold in encoded form.

    Attributes:
        pretrained: the checkpoint as it was given, for messages.
        vae: fingerprint of the VAE that made the moments.
        form: how images were resized before.
        flipped: whether there are moments of the mirrored images too.
        text: fingerprint of what made the text embeddings; None if there are none.
    """

    pretrained: str
    vae: str
    form: str
    flipped: bool
    text: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a set, in columns.

    Attributes:
        names: file of each shard: relative to the folder of the index, or a whole address.
        samples: number of samples of each, int64.
        bytes: size of each in bytes, int64.
        digests: fingerprint of each, or an empty text where it is not known.
        buckets: height and width that the images of each are for, ``[S, 2]``, zeros in validation; None without
            buckets.
        validation: which shards are for validation, bool.
        resolution: what the buckets and the encoded images were made for; None if there are neither.
        masks: whether every sample has a mask.
        controls: whether every sample has a control image.
        varied: whether captions have styles of their own that vary from epoch to epoch.
        encoded: what is encoded; None if nothing is.
        plan: what the set was packed from and how, as a fingerprint.
    """

    names: tuple[str, ...]
    samples: np.ndarray
    bytes: np.ndarray
    digests: tuple[str, ...]
    buckets: np.ndarray | None
    validation: np.ndarray
    resolution: Size | None = None
    masks: bool = False
    controls: bool = False
    varied: bool = False
    encoded: Encoded | None = None
    plan: str = ""

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], **about: Any) -> ShardIndex:
        """The index of shards that are each described by ``name``, ``samples``, ``bytes``, and the rest if known."""
        sizes = [record.get("bucket") or (0, 0) for record in records]
        return cls(
            tuple(record["name"] for record in records),
            np.array([record["samples"] for record in records], dtype=np.int64),
            np.array([record["bytes"] for record in records], dtype=np.int64),
            tuple(record.get("digest", "") for record in records),
            np.array(sizes, dtype=np.int64) if any(map(any, sizes)) else None,
            np.array([record.get("validation", False) for record in records], dtype=bool),
            **about,
        )

    @cached_property
    def identity(self) -> str:
        """Changes when the shards do."""
        return fingerprint(*self.names, self.samples.tobytes().hex(), self.bytes.tobytes().hex(), *self.digests)

    def text(self) -> str:
        """The index as JSON."""
        columns = {
            "name": list(self.names),
            "samples": self.samples.tolist(),
            "bytes": self.bytes.tolist(),
            "digest": list(self.digests),
            "bucket": None if self.buckets is None else self.buckets.tolist(),
            "validation": self.validation.tolist(),
        }
        about = {name: getattr(self, name) for name in ("resolution", "masks", "controls", "varied", "plan")}
        encoded = None if self.encoded is None else asdict(self.encoded)
        return json.dumps({"format": FORMAT, **about, "encoded": encoded, "shards": columns})


def parse_index(text: str | bytes, source: str) -> ShardIndex:
    """The index in a JSON text.

    Args:
        text: what `ShardIndex.text` gave.
        source: where it is from, as ``key=value``, for messages.

    Raises:
        SettingsError: if it is none.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        columns, encoded = content["shards"], content["encoded"]
        names = tuple(map(str, columns["name"]))
        index = ShardIndex(
            names,
            np.array(columns["samples"], dtype=np.int64),
            np.array(columns["bytes"], dtype=np.int64),
            tuple(map(str, columns["digest"])),
            None if columns["bucket"] is None else np.array(columns["bucket"], dtype=np.int64).reshape(len(names), 2),
            np.array(columns["validation"], dtype=bool),
            None if content["resolution"] is None else (content["resolution"][0], content["resolution"][1]),
            bool(content["masks"]),
            bool(content["controls"]),
            bool(content["varied"]),
            None if encoded is None else Encoded(**encoded),
            str(content["plan"]),
        )
        lengths = {len(names), *(len(column) for column in columns.values() if column is not None)}
        if len(lengths) != 1 or not names or index.samples.min() < 1:
            raise ValueError("its columns do not fit together")
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{source}: is no index of this version ({type(error).__name__}: {error}); give a folder that python -m "
            "sdmodule.data.pack wrote, or the addresses of .tar files."
        ) from error
    return index


@dataclass(frozen=True)
class Samples:
    """Some samples of a set: of each of some shards a run of them. Sample k is found by its number alone.

    Attributes:
        shards: numbers of the shards in the index.
        first: number of the first sample of each.
        counts: how many of each.
        groups: positions in ``shards`` of those that may share a batch; a single group without buckets.
        bucketed: whether the groups are buckets.
    """

    shards: np.ndarray
    first: np.ndarray
    counts: np.ndarray
    groups: tuple[np.ndarray, ...]
    bucketed: bool = False

    @cached_property
    def offsets(self) -> np.ndarray:
        """Number of the samples before each shard, and at the end that of all."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def position(self, index: int) -> int:
        """Position in ``shards`` of the shard of a sample."""
        return int(np.searchsorted(self.offsets, index, side="right")) - 1

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its number there."""
        position = self.position(index)
        return int(self.shards[position]), int(self.first[position] + index - self.offsets[position])

    def neighbours(self, index: int) -> list[int]:
        """The other samples of a sample's shard, from the next one on."""
        position = self.position(index)
        start, count = int(self.offsets[position]), int(self.counts[position])
        return [start + (index - start + k) % count for k in range(1, count)]


def select(index: ShardIndex, shards: np.ndarray, buckets: bool = False) -> Samples:
    """All samples of some shards, in groups of one bucket each if asked."""
    positions = np.arange(len(shards))
    groups = [positions]
    if buckets and index.buckets is not None:
        sizes = index.buckets[shards]
        groups = [positions[(sizes == size).all(axis=1)] for size in np.unique(sizes, axis=0)]
    return Samples(shards, np.zeros_like(index.samples[shards]), index.samples[shards], tuple(groups), buckets)


def hold_back(index: ShardIndex, samples: Samples, fraction: float, source: str) -> tuple[Samples, Samples]:
    """Hold back a share of the samples for validation, from as few shards as possible, chosen by a hash of their names.

    Returns:
        The samples for training, and those for validation.

    Raises:
        SettingsError: if there is a single sample.
    """
    total = len(samples)
    if not fraction:
        return samples, _run(samples, np.zeros_like(samples.counts), first=True)
    if total == 1:
        raise SettingsError(
            f"data.val_fraction={fraction}: {source} has a single sample, and none would be left for training; set "
            "data.val_fraction=0, or give another set as data.val_url."
        )
    left = min(max(1, round(fraction * total)), total - 1)
    held = np.zeros_like(samples.counts)
    for position in sorted(range(len(held)), key=lambda k: fingerprint(index.names[samples.shards[k]])):
        held[position] = min(left, samples.counts[position])
        left -= int(held[position])
        if not left:
            break
    return _run(samples, held, first=False), _run(samples, held, first=True)


def _run(samples: Samples, held: np.ndarray, first: bool) -> Samples:
    """The first ``held`` samples of each shard, or the others; shards without any are left out."""
    counts = held if first else samples.counts - held
    starts = samples.first if first else samples.first + held
    kept = counts > 0
    renumbered = np.cumsum(kept) - 1
    groups = tuple(renumbered[group[kept[group]]] for group in samples.groups)
    shards = samples.shards[kept]
    return replace(
        samples, shards=shards, first=starts[kept], counts=counts[kept], groups=tuple(g for g in groups if len(g))
    )


def typed_size(size: Size | None) -> str:
    """A resolution as one types it."""
    return "none" if size is None else str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
