"""Encode training images and captions once, before the first step, and read them from disk from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.data.base import TrainingData
from sdmodule.data.cache.latents import CachedEmbeddings, CachedMomentsDataset, ImageDataset, moments_keys
from sdmodule.data.cache.tensor_store import TensorStore
from sdmodule.data.cache.text import embed_prompts, text_fingerprint
from sdmodule.data.example import View
from sdmodule.data.streaming.datamodule import StreamingDataModule
from sdmodule.data.streaming.dataset import BatchEmbeddings
from sdmodule.data.streaming.packed import packed_moments
from sdmodule.data.worker_processes import loading_options
from sdmodule.errors import SettingsError, check_choice
from sdmodule.io.fingerprint import SIZE, fingerprint, model_fingerprint
from sdmodule.io.progress import LONG_TASK, progress
from sdmodule.sampling.requests import INPAINT
from sdmodule.speed.offload import Card, offloaded
from sdmodule.training.loss import encode_moments

LATENTS, ALL = CHOICES = ("latents", "all")
PIXELS_PER_BATCH = 8 * 512 * 512
IMAGES_PER_BATCH = 64
SAVES_MEMORY_OF = ("cuda",)
"""Types of devices that networks leave when training does not use them."""

KeyedView = tuple[str, int, View]
"""The key of an image's moments, the image's index, and how it is transformed."""

Encoded = tuple[int, dict[str, Tensor]]
"""How many images or captions were encoded, and the tensors to store."""


class LatentCache(Callback):
    """Train on cached latents and text embeddings instead of computing them at every step.

    Of latents the moments (mean and standard deviation) are cached, and latents are sampled from them at each step, so
    training is the same as without a cache. Entries are keyed by what they are computed from: moments by the image's
    bytes, its size and whether it is mirrored; embeddings by the caption; both in a folder per model, named by a
    fingerprint of its weights. So only what has changed is computed, each device a share of it, and an interrupted run
    leaves what it has finished. On a GPU, the networks that are no longer needed wait in the host's memory.

    Args:
        folder: folder of the cache, shared by all runs; with several machines, one that all of them can read.
        what: ``latents``, or ``all`` to cache text embeddings too.

    Raises:
        SettingsError: for another ``what``; in training, for data or a model that cannot be cached.
    """

    def __init__(self, folder: str | Path, what: str = LATENTS) -> None:
        check_choice("cache.what", what, CHOICES)
        self.folder = Path(folder).expanduser()
        self.what = what
        self._switched = ExitStack()
        self._cards: list[Card] = []
        self._streamed: BatchEmbeddings | None = None

    def check(self, data: Any, module: Any) -> None:
        """Check that the data and the model can be cached, without reading or writing anything.

        Args:
            data: the data module, set up.
            module: the model.

        Raises:
            SettingsError: if they cannot.
        """
        images: Any = getattr(data, "train_set", None)
        if not hasattr(images, "content") or not isinstance(data, TrainingData):
            raise SettingsError(
                f"cache={self.what}: cannot cache the images of this data module; use one of sdmodule.data, or "
                "cache=none."
            )
        if not hasattr(module, "encode_captions"):
            raise SettingsError(f"cache={self.what}: there is nothing to cache for this model; use cache=none.")
        if not images.center_crop:
            raise SettingsError(
                f"cache={self.what}: data.center_crop=false crops images at random, which cannot be cached; set "
                "data.center_crop=true, or cache=none."
            )
        if self.what == ALL and not images.fixed_captions:
            raise SettingsError(
                "cache=all: data.shuffle_tags=true and several templates vary the captions, which cannot be cached; "
                "leave them out, or use cache=latents."
            )
        encoders = [encoder for _, encoder in module.parts.text_encoders]
        if self.what == ALL and any(weight.requires_grad for encoder in encoders for weight in encoder.parameters()):
            raise SettingsError(
                "cache=all: text embeddings cannot be cached while the text encoder is trained; use cache=latents, or "
                "leave the text encoder frozen."
            )
        if isinstance(data, StreamingDataModule):
            self._packed(data, module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.check(data, pl_module)
        with ExitStack() as switched:
            cached, embeddings = self._cached(trainer, pl_module, data)
            switched.enter_context(data.training_on(cached))
            if embeddings is not None:
                switched.enter_context(pl_module.cached_embeddings(embeddings))  # type: ignore[operator]
            if pl_module.device.type in SAVES_MEMORY_OF:
                unused = self.unused_networks(pl_module)
                self._cards = [switched.enter_context(offloaded([[one]], pl_module.device)) for one in unused]
            self._switched = switched.pop_all()

    def unused_networks(self, module: Any) -> list[Any]:
        """The networks that training does not use, which leave a GPU and come back for validation alone."""
        encodes_masks = module.task == INPAINT  # the masked image, at every step
        encoders = [encoder for _, encoder in module.parts.text_encoders] if self.what == ALL else []
        return encoders if encodes_masks else [*encoders, module.vae]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._streamed is not None:
            self._streamed.hold(batch)
        for card in self._cards:
            card.clear()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._switched.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._switched.close()

    def _cached(self, trainer: Trainer, module: Any, data: Any) -> tuple[Any, CachedEmbeddings | None]:
        """The data set of moments, and the text embeddings if they are cached too."""
        if isinstance(data, StreamingDataModule):
            moments, self._streamed = self._packed(data, module)
            return moments, self._streamed
        images = self._cached_images(trainer, module, data)
        return images, self._cached_embeddings(trainer, module, images.images) if self.what == ALL else None

    def _packed(self, data: StreamingDataModule, module: Any) -> tuple[Any, BatchEmbeddings | None]:
        """Likewise of a streamed set, which was encoded when it was packed."""
        vae = model_fingerprint(module.vae, module.vae.config)
        text = text_fingerprint(module.parts) if self.what == ALL else None
        return packed_moments(data, vae, text, self._needs_images(module))

    @staticmethod
    def _needs_images(module: Any) -> bool:
        """Whether training needs the image beside its moments; masks and control images come with it."""
        return module.task == INPAINT or module.controlnet is not None or module.objective.masked

    def _cached_images(self, trainer: Trainer, module: Any, data: Any) -> CachedMomentsDataset:
        images: ImageDataset = data.train_set
        store = TensorStore(self.folder / f"moments-{model_fingerprint(module.vae, module.vae.config)}")

        flips = (False, True) if images.random_flip else (False,)
        keys = np.zeros((len(images), len(flips), SIZE), np.uint8)
        original_sizes = np.zeros((len(images), 2), np.int32)
        missing: dict[str, KeyedView] = {}
        with progress(len(images), "Looking for images in the cache", delay=LONG_TASK) as on_done:
            for index in range(len(images)):
                own = moments_keys(images.content(index), images.size_of(index), images.random_flip)
                original_sizes[index] = images.original_size(index)
                for flipped, key in enumerate(own):
                    keys[index, flipped] = np.frombuffer(bytes.fromhex(key), np.uint8)
                    if key not in store:
                        missing.setdefault(key, (key, index, View(flipped=bool(flipped))))
                on_done(1)

        def encode(share: Sequence[KeyedView]) -> Iterator[Encoded]:
            loader = DataLoader(
                _KeyedImages(images, share),
                batch_sampler=_batches_of_one_size([images.size_of(index) for _, index, _ in share]),
                generator=torch.Generator(),
                **loading_options(getattr(data, "num_workers", 0), trainer),
            )
            for batch in loader:
                images_on_device = batch["image"].to(module.device, non_blocking=True)
                moments = encode_moments(module.parts, images_on_device).cpu()
                yield len(moments), {key: moments[k] for k, key in enumerate(batch["key"])}

        self._fill(trainer, store, list(missing.values()), encode, "Encoding images")
        return CachedMomentsDataset(images, store, keys, original_sizes, self._needs_images(module))

    def _cached_embeddings(self, trainer: Trainer, module: Any, images: ImageDataset) -> CachedEmbeddings:
        parts = module.parts
        store = TensorStore(self.folder / f"embeddings-{text_fingerprint(parts)}")
        prompts = dict.fromkeys(["", *(escape_prompt(images.caption(index)) for index in range(len(images)))])
        missing = [prompt for prompt in prompts if fingerprint(prompt) not in store]

        def encode(share: Sequence[str]) -> Iterator[Encoded]:
            for rows in embed_prompts(share, parts):
                yield len(rows), {key: one for row in rows for key, one in CachedEmbeddings.entries(*row).items()}

        self._fill(trainer, store, missing, encode, "Encoding captions")
        return CachedEmbeddings(store)

    def _fill(
        self,
        trainer: Trainer,
        store: TensorStore,
        missing: Sequence[Any],
        encode: Callable[[Sequence[Any]], Iterable[Encoded]],
        doing: str,
    ) -> None:
        """Encode what is missing, each device its share; afterwards every device can read all of it."""
        trainer.strategy.barrier()  # until all have listed what is missing, or a slow device would see new files
        share = missing[trainer.global_rank :: trainer.world_size]
        if share:
            with progress(len(share), f"{doing} into {store.folder}") as on_done:

                def counted() -> Iterator[dict[str, Tensor]]:
                    for count, tensors in encode(share):
                        on_done(count)
                        yield tensors

                store.fill(counted())
        trainer.strategy.barrier()
        store.refresh()


class _KeyedImages(Dataset[dict[str, Any]]):
    """Images to encode, each with the key of its moments."""

    def __init__(self, images: ImageDataset, views: Sequence[KeyedView]) -> None:
        self.images = images
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    @override
    def __getitem__(self, position: int) -> dict[str, Any]:
        key, index, view = self.views[position]
        return {"key": key, "image": self.images.load(index, view)["image"]}


def _batches_of_one_size(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Batches of positions of images of one size, each small enough for a device's memory."""
    order = sorted(range(len(sizes)), key=lambda position: sizes[position])
    for (height, width), group in groupby(order, key=lambda position: sizes[position]):
        positions = list(group)
        count = min(IMAGES_PER_BATCH, max(1, PIXELS_PER_BATCH // (height * width)))
        yield from (positions[start : start + count] for start in range(0, len(positions), count))
