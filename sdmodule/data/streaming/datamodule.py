"""The data module of a streamed set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from typing_extensions import override

from sdmodule.data.base import TrainingData
from sdmodule.data.buckets import bucket_sizes, parse_size
from sdmodule.data.dataset import CANNY, FILES
from sdmodule.data.example import CaptionStyle
from sdmodule.data.sources.mix import WeightedSource
from sdmodule.data.streaming.dataset import (
    StreamedExamples,
    StreamedImages,
    StreamedMoments,
    check_conditioning,
    collate_encoded,
)
from sdmodule.data.streaming.index import Samples, ShardIndex, hold_back, select, typed_size
from sdmodule.data.streaming.remote import Remote, is_local
from sdmodule.data.streaming.sampler import StreamSampler, stream_loader
from sdmodule.data.streaming.set import PACKED_CAPTION, ShardReader, StreamSource
from sdmodule.data.streaming.shard_cache import ShardCache
from sdmodule.data.worker_processes import check_workers, loading_options
from sdmodule.errors import (
    SettingsError,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_path,
    check_seed,
)
from sdmodule.io.fingerprint import fingerprint

AHEAD = 3
"""Windows of shards that local disk must hold: the one that is read, the one before, and the next."""


class StreamingDataModule(TrainingData):
    """Batches of a set of tar shards at an address: local, ``https://``, ``s3://``, ``gs://``, ``hf://``.

    Whole shards are fetched to local disk when they are needed, and deleted when others need their room. The order is
    a function of seed and epoch alone; see `EpochOrder`.

    Attributes:
        index: the index of the set; known after `setup`.

    Args:
        url: a folder that `sdmodule.data.pack` wrote, or addresses of tars; see `StreamSource`.
        val_url: another set, for validation; all of its samples are used.
        resolution: height and width in pixels; one number gives squares.
        batch_size: images per batch on each device; if there are fewer images, one smaller batch.
        val_fraction: share of a set without validation samples of its own that is held back for validation.
        center_crop: crop the centre; otherwise training crops a random part.
        random_flip: flip half of the training images horizontally.
        buckets: train on each image in the bucket that it was packed for.
        conditioning: ``canny`` or ``files``, for the control images of a ControlNet.
        skip_bad: show another image of its shard instead of one that cannot be read.
        num_workers: processes that load images; None is by device: `loading_options`.
        seed: seed of the order, the crops, the flips and the shuffled tags.
        caption_key: key of the caption in a ``.json``.
        shuffle_window: number of shards whose samples are shuffled together.
        cache_folder: folder of fetched shards.
        cache_gb: size of that folder at most, in gigabytes.
        template: a text in which ``{}`` is replaced by the caption; of several, one is drawn each time.
        shuffle_tags: shuffle the comma-separated parts of a caption each time, in training.
        keep_tags: how many of the first parts stay in place.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a set that cannot be used.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        val_url: str | Sequence[str] | None = None,
        resolution: int | Sequence[int] = 64,
        batch_size: int = 4,
        val_fraction: float = 0.0,
        center_crop: bool = True,
        random_flip: bool = False,
        buckets: bool = False,
        conditioning: str | None = None,
        skip_bad: bool = False,
        num_workers: int | None = None,
        seed: int = 0,
        *,
        caption_key: str = PACKED_CAPTION,
        shuffle_window: int = 4,
        cache_folder: str = "outputs/cache/shards",
        cache_gb: float = 100.0,
        template: str | Sequence[str] | None = None,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
    ) -> None:
        super().__init__()
        if conditioning is not None:
            check_choice("data.conditioning", conditioning, (CANNY, FILES))
        check_int("data.batch_size", batch_size)
        check_int("data.shuffle_window", shuffle_window)
        check_workers(num_workers)
        check_seed("data.seed", seed)
        for name, value in {"center_crop": center_crop, "random_flip": random_flip, "buckets": buckets}.items():
            check_bool(f"data.{name}", value)
        check_bool("data.skip_bad", skip_bad)
        check_number("data.val_fraction", val_fraction, minimum=0, below=1)
        check_number("data.cache_gb", cache_gb, above=0)
        check_path("data.cache_folder", cache_folder)
        self.source = StreamSource(url, caption_key=caption_key, skip_bad=skip_bad)
        self.val_source = None if val_url is None else StreamSource(val_url, "data.val_url", caption_key, skip_bad)
        captions = WeightedSource(self.source, 1.0, template, shuffle_tags, keep_tags)  # type: ignore[arg-type]
        self.style = CaptionStyle(captions.templates, shuffle_tags, keep_tags)
        self.varied = captions.varied
        self.size = parse_size(resolution)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.buckets = buckets
        self.conditioning = conditioning
        self.skip_bad = skip_bad
        self.num_workers = num_workers
        self.seed = seed
        self.window = shuffle_window
        self.cache_folder = Path(cache_folder).expanduser()
        self.cache_bytes = round(cache_gb * 1e9)
        self.train_set: Any = None
        self.val_set: StreamedImages | None = None
        self.preview_set: StreamedImages | None = None
        self.sources = [captions]
        self.bare: list[Any] = []
        self._resumed: Mapping[str, Any] | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        self.index = self.source.read_index(self.cache_folder)
        self._check_buckets()
        check_conditioning(self.conditioning, self.index.controls, self.source)
        self.bare = [] if self.index.masks else self.sources
        own = select(self.index, np.flatnonzero(~self.index.validation), self.buckets)
        held = select(self.index, np.flatnonzero(self.index.validation))
        if not len(own):
            raise SettingsError(f"{self.source}: has validation samples only; give a set to train on.")
        if self.val_source is None and not len(held):
            own, held = hold_back(self.index, own, self.val_fraction, str(self.source))
        self.samples = own
        self.reader = self._reader(self.source, self.index, own)
        reader = self.reader
        if self.val_source is not None:
            val_index = self.val_source.read_index(self.cache_folder)
            held = select(val_index, np.arange(len(val_index.names)))
            check_conditioning(self.conditioning, val_index.controls, self.val_source)
            reader = self._reader(self.val_source, val_index, held)
        styled = self.style != CaptionStyle()
        style = self.style if styled else None
        self.train_set = StreamedImages(
            StreamedExamples(self.reader, own, style, masks=self.index.masks),
            self.size,
            self.skip_bad,
            center_crop=self.center_crop,
            random_flip=self.random_flip,
            seed=self.seed,
            vary_captions=self.varied if styled else self.index.varied,
            conditioning=self.conditioning,
        )
        unbucketed = Samples(own.shards, own.first, own.counts, (np.arange(len(own.shards)),))
        masks = reader.index.masks and self.index.masks
        self.val_set, self.preview_set = (
            StreamedImages(examples, self.size, self.skip_bad, conditioning=self.conditioning)
            for examples in (
                StreamedExamples(reader, held, style, masks),
                StreamedExamples(self.reader, unbucketed, style, self.index.masks),
            )
        )

    @property
    def instances(self) -> int:
        """How many samples the checks before a training look at: those of one shard."""
        return int(self.samples.counts[0])

    def _reader(self, source: StreamSource, index: ShardIndex, samples: Samples) -> ShardReader:
        keep = self.window * max(1, len(samples.groups))
        cache = ShardCache(self.cache_folder, self.cache_bytes, Remote(source.key))
        if is_local(source.shard(index, 0).url):  # it is read where it is
            return ShardReader(source, index, cache, keep)
        largest = sorted(index.bytes.tolist())[-AHEAD * keep :]
        if sum(largest) > self.cache_bytes:
            raise SettingsError(
                f"data.cache_gb={self.cache_bytes / 1e9:g}: must be at least {sum(largest) / 1e9:.3g} for {source}: "
                f"{AHEAD} times data.shuffle_window={self.window} shards"
                f"{' of each bucket' if samples.bucketed else ''}; raise it, or lower data.shuffle_window."
            )
        return ShardReader(source, index, cache, keep)

    def _check_buckets(self) -> None:
        """Check that a set that is used in buckets was packed in those."""
        if not self.buckets:
            return
        if self.index.buckets is None:
            raise SettingsError(
                f"data.buckets=true: {self.source} was packed without buckets; pack it with data.buckets=true, or "
                "leave it out."
            )
        packed = {tuple(size) for size in self.index.buckets[~self.index.validation].tolist()}
        if self.index.resolution != self.size or not packed <= {*bucket_sizes(self.size)}:
            raise SettingsError(
                f"data.buckets=true: {self.source} was packed for resolution={typed_size(self.index.resolution)}, and "
                f"this is {typed_size(self.size)}; train at that resolution, or pack the set again."
            )

    @cached_property
    def _order(self) -> str:
        """Changes when the order of the samples does."""
        drawn_from = (self.seed, self.buckets, self.val_fraction, self.window)
        return fingerprint(self.index.identity, *drawn_from)

    @cached_property
    def _ahead(self) -> Any:
        return self.reader.fetch_ahead(self.samples)

    @override
    def train_dataloader(self) -> DataLoader:
        encoded = isinstance(self.train_set, StreamedMoments)
        state = self._resumed
        if state is not None and state["order"] != self._order:
            rank_zero_warn(
                f"{self.source}: the set, data.seed, data.buckets, data.val_fraction or data.shuffle_window has "
                "changed since the checkpoint was written; this epoch shows its samples in another order."
            )
            state = None
        settings = (self.batch_size, self.seed, self.num_workers, self.trainer, self.window, self._ahead)
        collate = collate_encoded if encoded else None
        loader = stream_loader(self.train_set, self.samples, *settings, collate, state and state["segment"])
        if small := self._small_buckets(loader):
            rank_zero_warn(
                f"data.buckets=true: some buckets have fewer than the {small[1]} images of a batch: {small[0]} pixels "
                "(height x width); an epoch repeats their images. A smaller data.batch_size avoids that."
            )
        return loader

    def _small_buckets(self, loader: DataLoader) -> tuple[str, int] | None:
        """The buckets that do not fill one batch, and how many images that has."""
        count = loader.sampler.global_batch_size  # type: ignore[attr-defined]
        if not self.samples.bucketed or self.index.buckets is None:
            return None
        told = []
        for group in self.samples.groups:
            height, width = self.index.buckets[self.samples.shards[group[0]]]
            if (own := int(self.samples.counts[group].sum())) < count:
                told.append(f"{own} of {height}x{width}")
        return (", ".join(told), count) if told else None

    @override
    def val_dataloader(self) -> DataLoader | Iterable:
        assert self.val_set is not None
        if not len(self.val_set):
            return []
        batches = -(-len(self.val_set) // self.batch_size)
        return DataLoader(self.val_set, self.batch_size, **loading_options(self.num_workers, self.trainer, batches))

    @override
    def state_dict(self) -> dict[str, Any]:
        loader = self.trainer.train_dataloader if self.trainer else None
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, StreamSampler):
            return super().state_dict()
        return {**super().state_dict(), "stream": {"order": self._order, "segment": sampler.state()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._resumed = state_dict.get("stream")
