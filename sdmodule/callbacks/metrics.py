"""Measure image quality at every validation: text-image score, FID and KID of images sampled for fixed prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from sdmodule.callbacks.timing_figures import on_all_devices
from sdmodule.callbacks.validation_samples import shows_progress
from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.errors import SettingsError, check_int, check_number, check_seed
from sdmodule.evaluation.distances import frechet_distance, kernel_distance
from sdmodule.evaluation.scorer import Scorer, batches
from sdmodule.evaluation.text_image import clip_scores
from sdmodule.evaluation.transformers_scorer import EXAMPLE, TransformersScorer
from sdmodule.io.images import to_images
from sdmodule.sampling.requests import TEXT2IMAGE, build_requests
from sdmodule.training.sharding import gathered


class QualityMetrics(Callback):
    """Log ``val/clip_score``, ``val/fid`` and ``val/kid`` at every validation, with the EMA weights if there are any.

    Images are sampled for the same prompts from the same seeds each time; FID and KID compare them with as many images
    of the validation data, by the scorer's features. Each device samples its share. The random numbers of the training
    stay as they are. `TrainingCheckpoint` with ``monitor="val/fid"`` keeps the best weights.

    Args:
        scorer: a CLIP-like model, as a folder or a hub id, or any `Scorer`.
        prompts: what to sample; if None, the first captions of the validation data.
        num_prompts: number of captions to sample if ``prompts`` is None.
        batch_size: images per call of the networks.
        seed: image k is drawn from ``seed + k``.
        max_share: share of the training's time that it may take. A validation that begins above it goes unmeasured, but
            for the first.

    Raises:
        SettingsError: for a prompt with an invalid weight, and a number out of range.
    """

    def __init__(
        self,
        scorer: str | Path | Scorer | None = None,
        prompts: Sequence[str] | None = None,
        num_prompts: int = 64,
        batch_size: int = 8,
        seed: int = 0,
        max_share: float = 0.2,
    ) -> None:
        check_int("callbacks.metrics.num_prompts", num_prompts, minimum=2)
        check_int("callbacks.metrics.batch_size", batch_size)
        check_seed("callbacks.metrics.seed", seed)
        check_number("callbacks.metrics.max_share", max_share, above=0, maximum=1)
        self.scorer = scorer
        self.prompts = [request.prompt for request in build_requests(prompts)] if prompts else []
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.seed = seed
        self.max_share = max_share
        self.seconds = 0.0
        self._start = time.perf_counter()
        self._loaded: Scorer | None = None
        self._texts: list[str] = []  # what this device samples, as the scorer reads it
        self._real: Tensor | None = None  # features of images of the data, from all devices

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "validate"):
            self.load(pl_module, trainer.strategy.root_device)

    def load(self, module: LightningModule, device: torch.device) -> None:
        """Load the scorer, unless it is there already.

        Args:
            module: what will be sampled from.
            device: where to score.

        Raises:
            SettingsError: if the module does not sample from prompts alone, or the scorer cannot be used.
        """
        if self._loaded is not None:
            return
        if getattr(module, "task", None) != TEXT2IMAGE or module.controlnet is not None:
            raise SettingsError(
                "callbacks=[…,metrics]: samples from prompts alone, which this model does not; leave it out, or use "
                "model=text2image without a ControlNet."
            )
        if self.scorer is None:
            raise SettingsError(
                "callbacks.metrics.scorer=null: must be given; give a CLIP-like model as a folder or a hub id such as "
                f"{EXAMPLE}."
            )
        given = self.scorer
        self._loaded = TransformersScorer(given, device) if isinstance(given, (str, Path)) else given

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self.seconds = time.perf_counter(), 0.0
        if not trainer.enable_validation:
            rank_zero_warn("callbacks=[…,metrics] measures at validations, and there are none: nothing is measured.")

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        share = self.seconds / (time.perf_counter() - self._start)
        if trainer.strategy.broadcast(share > self.max_share):
            _say(
                trainer,
                f"metrics: not measured at step {trainer.global_step}, as they have taken {share:.0%} of the time; "
                f"callbacks.metrics.max_share={self.max_share:g}",
            )
            return
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[pl_module.device] if pl_module.device.type == "cuda" else []):
            figures = self._measure(trainer, pl_module)
        for name, value in figures.items():
            pl_module.log(f"val/{name}", value, sync_dist=True, batch_size=1)
        now = time.perf_counter()
        self.seconds += now - began
        listed = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        fitting = trainer.state.fn == TrainerFn.FITTING
        share_now = f", {self.seconds / (now - self._start):.0%} of the training so far" if fitting else ""
        _say(trainer, f"metrics at step {trainer.global_step}: {listed} ({now - began:.1f} s{share_now})")

    def _measure(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        assert self._loaded is not None
        if self._real is None:
            self._real = self._read_data(trainer)
        with gathered(pl_module):
            own = self._sampled(trainer, pl_module)
        texts = self._loaded.text_features(self._texts) if self._texts else torch.empty(0)
        found = on_all_devices((own, texts), trainer)
        images = torch.cat([features for features, _ in found if len(features)])
        prompts = torch.cat([features for _, features in found if len(features)])
        figures = {"clip_score": float(clip_scores(images, prompts).mean())}
        if len(self._real) > 1 and len(images) > 1:
            figures["fid"] = frechet_distance(images, self._real)
            figures["kid"] = float(kernel_distance(images, self._real))
        return figures

    def _sampled(self, trainer: Trainer, pl_module: Any) -> Tensor:
        """Features of this device's images, ``[N, D]``; image k of all devices is drawn from ``seed + k``."""
        assert self._loaded is not None
        first = self.seed + self._share(trainer) * trainer.global_rank
        prompts = self._texts if self.prompts else [escape_prompt(text) for text in self._texts]
        features, shown = [], shows_progress(trainer)
        for number, batch in enumerate(batches(prompts, self.batch_size)):
            seed = first + number * self.batch_size
            features.append(
                self._loaded.image_features(pl_module.infer(batch, seed=seed, show_progress=shown)["samples"])
            )
        return torch.cat(features) if features else torch.empty(0)

    def _share(self, trainer: Trainer) -> int:
        """How many images a device samples; the last one may have fewer."""
        return -(-(len(self.prompts) or self.num_prompts) // trainer.world_size)

    def _read_data(self, trainer: Trainer) -> Tensor:
        """Take this device's prompts; returns the features of as many images of the validation data of all devices."""
        assert self._loaded is not None
        share = self._share(trainer)
        self._texts = self.prompts[share * trainer.global_rank :][:share]
        captions: list[str] = []
        features: list[Tensor] = []
        for batch in trainer.val_dataloaders:  # type: ignore[union-attr]
            left = share - len(captions)
            if left <= 0 or not isinstance(batch, Mapping):
                break
            captions += islice(batch["caption"], left)
            if "image" in batch:
                features.append(self._loaded.image_features(to_images(batch["image"][:left].float().cpu() / 2 + 0.5)))
        if not self.prompts:
            self._texts = captions
        own = torch.cat(features) if features else torch.empty(0)
        rows = [part for part in on_all_devices(own, trainer) if len(part)]
        return torch.cat(rows) if rows else own


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, flush=True)
