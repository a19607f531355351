"""Encode the training images, and their captions, once: before the first step, and only what is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.conditioning.text import count_chunks, encode_prompts, escape_prompt
from sdmodule.data.base import TrainingData
from sdmodule.data.cache.latents import CachedEmbeddings, CachedMomentsDataset, ImageDataset, moments_keys
from sdmodule.data.cache.tensor_store import TensorStore
from sdmodule.data.example import View
from sdmodule.errors import SettingsError
from sdmodule.io.fingerprint import fingerprint, model_fingerprint
from sdmodule.io.progress import progress
from sdmodule.sampling.requests import INPAINT
from sdmodule.training.loss import encode_moments

LATENTS, ALL = "latents", "all"
PIXELS_AT_ONCE = 8 * 512 * 512
CAPTIONS_AT_ONCE = 64

Sight = tuple[str, int, View]
"""The key of an image's moments, its index, and how it is shown."""


class LatentCache(Callback):
    """Train on moments of latents and on embeddings that are read from disk instead of computed at every step.

    Moments are mean and standard deviation: latents are drawn from them anew each time, so that training is the same.
    Both are kept under what they are made of, in a folder for each model's weights: moments under the image's bytes,
    its size, and whether it is mirrored; embeddings under the caption. What has changed is made anew, the rest is
    found. Devices make a share each. An interrupted making goes on where it stopped.

    Args:
        folder: where they are kept, for all runs; with several machines, one that all of them see.
        what: ``latents``, or ``all`` for embeddings of captions too.

    Raises:
        SettingsError: for another ``what``; in training, for data or a model whose part cannot be done beforehand.
    """

    def __init__(self, folder: str | Path, what: str = LATENTS) -> None:
        if what not in (LATENTS, ALL):
            raise SettingsError(f"cache.what={what} is not known; give {LATENTS} or {ALL}.")
        self.folder = Path(folder).expanduser()
        self.what = what
        self._switched = ExitStack()

    def check(self, data: Any, module: Any) -> None:
        """Whether this can be cached; nothing is read or written.

        Args:
            data: the data module.
            module: the model.

        Raises:
            SettingsError: if not.
        """
        images: Any = getattr(data, "train_set", None)
        if not hasattr(images, "content") or not isinstance(data, TrainingData):
            raise SettingsError(
                f"cache={self.what} does not know the images of these data; use those of conf/data, or cache=none."
            )
        if not hasattr(module, "encode_captions"):
            raise SettingsError(f"cache={self.what} has nothing to do for this model; use cache=none.")
        if not images.center_crop:
            raise SettingsError(
                f"data.center_crop=false crops another part at each time, which cache={self.what} cannot know; set "
                "data.center_crop=true, or cache=none."
            )
        if self.what == ALL and not images.fixed_captions:
            raise SettingsError(
                "data.shuffle_tags=true and several templates give images another caption at each time, which "
                "cache=all cannot know; do without, or use cache=latents."
            )
        if self.what == ALL and any(weight.requires_grad for weight in module.text_encoder.parameters()):
            raise SettingsError(
                "cache=all keeps the embeddings of captions, and the text encoder is trained, which changes them; use "
                "cache=latents, or do not train it."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.check(data, pl_module)
        if isinstance(trainer.strategy, FSDPStrategy):
            raise SettingsError(f"cache={self.what} needs whole models on each device; use trainer=ddp, or cache=none.")
        with ExitStack() as switched:
            cached = self._cached_images(trainer, pl_module, data)
            switched.enter_context(data.training_on(cached))
            if self.what == ALL:
                embeddings = self._cached_embeddings(trainer, pl_module, cached.images)
                switched.enter_context(pl_module.cached_embeddings(embeddings))  # type: ignore[operator]
            self._switched = switched.pop_all()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._switched.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._switched.close()

    def _cached_images(self, trainer: Trainer, module: Any, data: Any) -> CachedMomentsDataset:
        images: ImageDataset = data.train_set
        store = TensorStore(self.folder / f"moments-{model_fingerprint(module.vae, module.vae.config)}")

        def keys_of(index: int) -> list[str]:
            return moments_keys(images.content(index), images.size_of(index), images.random_flip)

        keys = _shared(trainer, range(len(images)), keys_of)
        sights: dict[str, Sight] = {}
        for index, own in enumerate(keys):
            for mirrored, key in enumerate(own):
                if key not in store:
                    sights.setdefault(key, (key, index, View(mirrored=bool(mirrored))))

        def make(share: Sequence[Sight]) -> Iterator[dict[str, Tensor]]:
            loader = DataLoader(
                _Sights(images, share),
                batch_sampler=_batches_of_one_size([images.size_of(index) for _, index, _ in share]),
                num_workers=getattr(data, "num_workers", 0),
                generator=torch.Generator(),
            )
            for batch in loader:
                moments = encode_moments(module.vae, batch["image"].to(module.device)).cpu()
                yield {key: moments[k] for k, key in enumerate(batch["key"])}

        self._fill(trainer, store, list(sights.values()), make, "Encoding images")
        # masks and edges are of the image itself
        beside = module.task == INPAINT or module.controlnet is not None or module.objective.masked
        return CachedMomentsDataset(images, store, keys, with_images=beside)

    def _cached_embeddings(self, trainer: Trainer, module: Any, images: ImageDataset) -> CachedEmbeddings:
        tokenizer, encoder = module.parts.tokenizer, module.text_encoder
        model = model_fingerprint(encoder, encoder.config.to_dict())
        words = fingerprint(tokenizer.model_max_length, sorted(tokenizer.get_vocab().items()))
        store = TensorStore(self.folder / f"embeddings-{fingerprint(model, words)}")
        prompts = dict.fromkeys(["", *(escape_prompt(images.caption(index)) for index in range(len(images)))])
        missing = [prompt for prompt in prompts if fingerprint(prompt) not in store]

        @torch.no_grad()
        def make(share: Sequence[str]) -> Iterator[dict[str, Tensor]]:
            for start in range(0, len(share), CAPTIONS_AT_ONCE):
                batch = share[start : start + CAPTIONS_AT_ONCE]
                lengths = [count_chunks(prompt, tokenizer) * tokenizer.model_max_length for prompt in batch]
                rows = zip(batch, encode_prompts(batch, tokenizer, encoder).cpu(), lengths, strict=True)
                yield {fingerprint(prompt): row[:length] for prompt, row, length in rows}

        self._fill(trainer, store, missing, make, "Encoding captions")
        return CachedEmbeddings(store)

    def _fill(
        self,
        trainer: Trainer,
        store: TensorStore,
        missing: Sequence[Any],
        make: Callable[[Sequence[Any]], Iterable[dict[str, Tensor]]],
        what: str,
    ) -> None:
        """Make what is missing, each device its share; afterwards every device finds all of it."""
        trainer.strategy.barrier()  # or a fast device's first file is taken into account by a slow one
        share = missing[trainer.global_rank :: trainer.world_size]
        if share:
            with progress(len(share), f"{what} into {store.folder}") as on_done:

                def counted() -> Iterator[dict[str, Tensor]]:
                    for tensors in make(share):
                        on_done(len(tensors))
                        yield tensors

                store.fill(counted())
        trainer.strategy.barrier()
        store.refresh()


class _Sights(Dataset[dict[str, Any]]):
    """Images as they are to be encoded, each with its key."""

    def __init__(self, images: ImageDataset, sights: Sequence[Sight]) -> None:
        self.images = images
        self.sights = sights

    def __len__(self) -> int:
        return len(self.sights)

    @override
    def __getitem__(self, position: int) -> dict[str, Any]:
        key, index, view = self.sights[position]
        return {"key": key, "image": self.images.seen(index, view)["image"]}


def _batches_of_one_size(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Positions of images of one size, as many at once as a device can hold."""
    order = sorted(range(len(sizes)), key=lambda position: sizes[position])
    for (height, width), group in groupby(order, key=lambda position: sizes[position]):
        positions = list(group)
        count = min(64, max(1, PIXELS_AT_ONCE // (height * width)))
        yield from (positions[start : start + count] for start in range(0, len(positions), count))


def _shared(trainer: Trainer, indices: Sequence[int], work: Callable[[int], Any]) -> list[Any]:
    """Do some work for each index, a share on each device; every device has all results, in order."""
    devices = trainer.world_size
    own = [work(index) for index in indices[trainer.global_rank :: devices]]
    if devices == 1:
        return own
    parts: list[list[Any]] = [[] for _ in range(devices)]
    torch.distributed.all_gather_object(parts, own)
    return [parts[index % devices][index // devices] for index in indices]
