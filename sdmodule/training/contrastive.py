"""Training a CLIP-like model on images and their captions (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from sdmodule.errors import SettingsError, check_choice, check_int, check_seed
from sdmodule.evaluation.clip_folder import EMBEDDED, read_clip
from sdmodule.evaluation.text_image import prompt_ranks
from sdmodule.io.redact import shorten_home
from sdmodule.training.full import FullTuning
from sdmodule.training.image_variation import ImageVariation
from sdmodule.training.optimizers import Optimization
from sdmodule.training.rng import generator_for
from sdmodule.training.strategies import check_strategy
from sdmodule.training.trainable import TrainableModule
from sdmodule.training.tuning import check_layout, choose_tuning

MAX_SCALE = 100.0
"""Highest inverse temperature, as of CLIP."""

TOP = (1, 5)
"""The k of the top-k accuracies of validation."""


class ContrastiveModule(TrainableModule):
    """Train a CLIP of transformers from scratch or from a checkpoint, to be a scorer of images.

    The loss is InfoNCE over the images and captions of a batch, in both directions, with a learned temperature (Radford
    et al. 2021, figure 3). Images with the same caption are no negatives of each other. Each device has its own batch.
    As texts cost little, images can be compared with the captions of earlier batches too, encoded anew.

    Validation logs the loss of a batch, and ``retrieval_top1`` and ``_top5``: how often the caption of an image is the
    nearest, or among the five nearest, of all captions in the validation data of a device.

    Args:
        pretrained: the folder of a CLIP that transformers wrote, a hub id, or ``tiny-clip``, which has no weights yet.
        scratch: ``["clip"]`` to start from random weights in the same architecture, or nothing.
        tuning: only ``full`` is possible.
        variation: changes of training images, see `ImageVariation`; None for none.
        negatives: captions of earlier batches that each image is compared with beside those of its own.
        optimizer: takes the trainable parameters and returns the optimizer.
        lr_scheduler: takes the optimizer and returns its learning rate schedule.
        seed: seed of the changes of images.

    Raises:
        SettingsError: if the model cannot be read or is no CLIP, for another tuning, and for a value out of range.
    """

    kind = "contrastive"
    layouts = ("diffusers",)

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        scratch: Iterable[str] = (),
        tuning: Mapping[str, Any] | None = None,
        variation: Mapping[str, float] | None = None,
        negatives: int = 0,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if choose_tuning(tuning) != FullTuning():
            raise SettingsError(f"tuning={tuning}: is for UNets, and model=contrastive has none; leave it out.")
        for part in (scratch := list(scratch)):
            check_choice("scratch", part, ["clip"])
        check_seed("model.seed", seed)
        check_int("model.negatives", negatives, minimum=0)
        self.variation = ImageVariation.of(variation)
        pretrained = shorten_home(pretrained)
        variation = dict(variation or {})
        named = {"pretrained": pretrained, "variation": variation, "negatives": negatives, "seed": seed}
        self.save_hyperparameters(named)
        self.folder = read_clip(pretrained, "pretrained", scratch=bool(scratch))
        self.clip: Any = self.folder.model
        if self.clip.config.model_type != "clip":
            raise SettingsError(f"pretrained={pretrained}: is a {type(self.clip).__name__}; give a CLIPModel.")
        self.optimization = Optimization(optimizer, lr_scheduler, usual={"lr": 1e-4})
        self.negatives = negatives
        self.seed = seed
        self._told_of_long = False
        self._earlier: list[str] = []  # captions of earlier batches, the last ones first
        self._validated: dict[str, list[tuple[Tensor, Tensor, Sequence[str]]]] = {}  # by the suffix of metrics

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the model reads."""
        return self.clip.config.vision_config.image_size

    @override
    def forward(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Normalized features ``[B, D]`` of images ``[B, 3, H, W]`` in [-1, 1], and ``[T, D]`` of captions.

        Raises:
            SettingsError: for images of another size than the model reads.
        """
        if images.shape[-2:] != (self.resolution,) * 2:
            height, width = images.shape[-2:]
            raise SettingsError(
                f"data: its images are of {height}x{width} pixels, and this model reads {self.resolution}x"
                f"{self.resolution}; set data.size={self.resolution}, or resolution={self.resolution}."
            )
        read = self.folder.image_processor
        mean, deviation = (torch.tensor(v).to(images)[:, None, None] for v in (read.image_mean, read.image_std))
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.folder.tokenizer(
            list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(images.device)
        self._report_long(captions, [encoding.overflowing for encoding in tokens.encodings], length)
        of_images = self.clip.get_image_features(pixel_values=(images / 2 + 0.5 - mean) / deviation).pooler_output
        of_texts = self.clip.get_text_features(**tokens).pooler_output
        return F.normalize(of_images.float(), dim=-1), F.normalize(of_texts.float(), dim=-1)

    def _report_long(self, captions: Sequence[str], rests: Sequence[Sequence[Any]], length: int) -> None:
        """Say once that captions are longer than the model reads."""
        long = next((caption for caption, rest in zip(captions, rests, strict=True) if rest), None)
        if long is not None and not self._told_of_long:
            self._told_of_long = True
            rank_zero_warn(f"The model reads {length} tokens; the rest of longer captions is left out: {long[:60]}…")

    def loss(self, images: Tensor, texts: Tensor, captions: Sequence[str]) -> Tensor:
        """InfoNCE in both directions.

        Args:
            images: normalized features ``[B, D]``.
            texts: normalized features ``[T, D]`` of the captions: first those of the images, then further ones.
            captions: the texts.
        """
        number = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
        same = torch.tensor([number[caption] for caption in captions])
        duplicates = (same[: len(images), None] == same).fill_diagonal_(False)
        with torch.autocast(images.device.type, enabled=False):
            logits = self.clip.logit_scale.exp().clamp(max=MAX_SCALE) * images @ texts.T
        logits = logits.masked_fill(duplicates.to(logits.device), -torch.inf)
        own = torch.arange(len(images), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, : len(images)].T, own)) / 2

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch = self.read_batch(batch, batch_idx)
        captions = [*batch["caption"], *self._earlier]
        step, rank = (self.trainer.global_step, self.trainer.global_rank) if self._trainer else (0, 0)
        changed = self.variation(batch["image"], generator_for(self.seed, step, batch_idx, rank))
        images, texts = self(changed, captions)
        loss = self.loss(images, texts, captions)
        self._earlier = captions[: self.negatives]
        self.log_training("loss", loss)
        return self.weighted(loss, len(changed))

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        batch, size = self.validation_batch(batch, batch_idx, dataloader_idx)
        images, texts = self(batch["image"], batch["caption"])
        self.log_validation({"loss": self.loss(images, texts, batch["caption"])}, main="loss", batch_size=size)
        self._validated.setdefault(self.val_log_suffix, []).append((images, texts, batch["caption"]))

    @override
    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        for suffix, batches in self._validated.items():
            images = torch.cat([images for images, _, _ in batches]).cpu()
            texts = torch.cat([texts for _, texts, _ in batches]).cpu()
            captions = [caption for _, _, own in batches for caption in own]
            first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
            place = {caption: k for k, caption in enumerate(first)}
            rows = torch.tensor([place[caption] for caption in captions])
            ranks = prompt_ranks(images, texts[list(first.values())], rows)
            for top in TOP:
                rate = (ranks < top).float().mean().to(self.device)
                self.log(f"{stage}/retrieval_top{top}{suffix}", rate, sync_dist=True, prog_bar=top == 1 and not suffix)
        self._validated.clear()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["earlier_captions"] = self._earlier

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._earlier = list(checkpoint.get("earlier_captions", ()))

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self._trainer)
        if stage == "fit":
            self.check_fit()
            if self._trainer is not None and self._trainer.strategy.root_device.type == "cpu":
                # the backward pass of torch's fused attention takes more than half of a step there
                self.clip.set_attn_implementation("eager")

    def save_pretrained(self, folder: str | Path, dtype: str = "float32", layout: str = "diffusers") -> None:
        """Write a folder that transformers' ``CLIPModel`` reads, and that is a scorer."""
        check_layout(self, layout)
        self.folder.save(folder, dtype)
