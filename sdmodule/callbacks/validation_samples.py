"""Sample the same prompts at every validation, to see the training progress."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from typing_extensions import override

from sdmodule.callbacks.ema import EMA
from sdmodule.callbacks.log_images import log_images
from sdmodule.callbacks.validation_interval import ValidationInterval
from sdmodule.conditioning.inpaint import mask_out
from sdmodule.conditioning.random_masks import draw_masks
from sdmodule.conditioning.text import escape_prompt
from sdmodule.io.images import captioned_sheet, contact_sheet, to_images
from sdmodule.io.png_metadata import save_png
from sdmodule.ranges import check_whole
from sdmodule.sampling.requests import INPAINT, build_requests

TILE = 192
"""Pixels of an image's side on the sheet."""


class ValidationSamples(Callback):
    """Write a captioned sheet ``<step>.png`` at every validation, and hand the images to the loggers that take them.

    Where no images are kept to validate on, there are sheets at the same steps, of images that are trained on. The
    end of the training has its sheet too, whether or not that step is validated. Nothing of it touches the random
    numbers of the training. For inpainting each image stands beside the one that it repaints and beside what is left
    of that under its mask; with a ControlNet beside its control image. All of these are the same at every validation.
    A module that samples nothing, such as an autoencoder, is left alone.

    Args:
        output_dir: folder of the sheets.
        prompts: what to sample; the first captions of the validation data if None, or of the training data where there
            is none to validate on.
        num_prompts: how many of those captions.
        seed: seed of the first image.

    Raises:
        SettingsError: for a prompt that cannot be read, and a number that is out of range.
    """

    def __init__(
        self, output_dir: str | Path, prompts: Sequence[str] | None = None, num_prompts: int = 4, seed: int = 0
    ) -> None:
        check_whole("callbacks.samples.num_prompts", num_prompts)
        check_whole("callbacks.samples.seed", seed, least=0)
        self.output_dir = Path(output_dir)
        self.prompts = [request.prompt for request in build_requests(prompts)] if prompts else []
        self.num_prompts = num_prompts
        self.seed = seed
        self._captions: list[str] = []  # of the data, the same ones each time
        self._step = -1
        self._trained = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._trained = trainer.global_step != self._trained, trainer.global_step
        if not stepped or trainer.val_dataloaders or not trainer.enable_validation or not _shown(trainer):
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        steps = next((callback.steps for callback in callbacks if isinstance(callback, ValidationInterval)), None)
        if steps and trainer.global_step % steps == 0 and trainer.is_global_zero:
            self._sample_average(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._sample(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._step and trainer.is_global_zero:
            self._sample_average(trainer, pl_module)

    def _sample_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        with ema.applied(pl_module) if ema else nullcontext():
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "infer"):
            return
        self._step = trainer.global_step
        if not self.prompts and not self._captions:
            self._captions = self._first_captions(trainer)
        shown = self.prompts or self._captions
        prompts = self.prompts or [escape_prompt(caption) for caption in shown]
        if pl_module.task == INPAINT:
            images, across = self._repainted(trainer, pl_module, prompts), 3
        elif pl_module.controlnet is not None:
            images, across = self._controlled(trainer, pl_module, prompts), 2
        else:
            images, across = pl_module.infer(prompts, seed=self.seed, show_progress=False)["samples"], 1  # type: ignore[operator]
        captions = [f"{prompt} · {self.seed + k}" for k, prompt in enumerate(shown)]
        self.output_dir.mkdir(parents=True, exist_ok=True)
        save_png(
            captioned_sheet(images, captions, across * TILE), self.output_dir / f"{trainer.global_step:06d}.png", {}
        )
        log_images(trainer.loggers, "val/samples", images, captions, trainer.global_step)

    def _repainted(self, trainer: Trainer, pl_module: Any, prompts: Sequence[str]) -> list[Image.Image]:
        """For each prompt an image of the data, what its mask leaves of it, and the image repainted."""
        before: list[Image.Image] = []
        left: list[Image.Image] = []
        masks: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(self.seed)
        for example in self._examples(trainer, len(prompts)):
            image, mask = example["image"][None], example.get("mask")
            hole = draw_masks(1, image.shape[-2:], 0.0, generator) if mask is None else mask[None]
            before += to_images(image / 2 + 0.5)
            left += to_images(mask_out(image, hole) / 2 + 0.5)
            masks += hole
        after = pl_module.infer(prompts, before, masks, seed=self.seed, show_progress=False)["samples"]
        return [contact_sheet(list(row), columns=3) for row in zip(before, left, after, strict=True)]

    def _controlled(self, trainer: Trainer, pl_module: Any, prompts: Sequence[str]) -> list[Image.Image]:
        """For each prompt a control image of the data, and the image that follows it."""
        examples = self._examples(trainer, len(prompts))
        controls = [to_images(example["conditioning"][None])[0] for example in examples]
        made = pl_module.infer(prompts, control=controls, seed=self.seed, show_progress=False)["samples"]
        seen = [control.resize(image.size) for control, image in zip(controls, made, strict=True)]
        return [contact_sheet(list(row), columns=2) for row in zip(seen, made, strict=True)]

    def _examples(self, trainer: Trainer, count: int) -> list[dict[str, torch.Tensor]]:
        """The images of the first ``count`` examples of the data, again from the first if there are too few."""
        if not trainer.val_dataloaders and (shown := _shown(trainer)):
            return [shown[k % len(shown)] for k in range(count)]
        examples: list[dict[str, torch.Tensor]] = []
        batches = iter(trainer.val_dataloaders or trainer.train_dataloader)  # type: ignore[arg-type]
        while len(examples) < count and (batch := next(batches, None)):
            images = {name: rows for name, rows in batch.items() if name != "caption"}
            examples += [{name: rows[k] for name, rows in images.items()} for k in range(len(batch["caption"]))]
        return [examples[k % len(examples)] for k in range(count)]

    def _first_captions(self, trainer: Trainer) -> list[str]:
        if not trainer.val_dataloaders and (shown := _shown(trainer)):
            return [shown.caption(k) for k in range(min(self.num_prompts, len(shown)))]
        captions: list[str] = []
        for batch in trainer.val_dataloaders or trainer.train_dataloader:  # type: ignore[union-attr]
            captions += batch["caption"]
            if len(captions) >= self.num_prompts:
                break
        return captions[: self.num_prompts]


def _shown(trainer: Trainer) -> Any:
    """The images of training, each always in the same way; none for data that do not have them."""
    return getattr(trainer.datamodule, "shown_set", None)  # type: ignore[attr-defined]
