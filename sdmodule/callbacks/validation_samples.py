"""Sample the same prompts at every validation, to see how the training progresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from typing_extensions import override

from sdmodule.callbacks.ema import EMA
from sdmodule.callbacks.frozen_weights import sampling_precision
from sdmodule.callbacks.log_images import log_images
from sdmodule.callbacks.timing_figures import on_all_devices
from sdmodule.callbacks.validation_interval import ValidationInterval
from sdmodule.conditioning.inpaint import mask_out
from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.conditioning.random_masks import draw_masks
from sdmodule.errors import check_int, check_seed
from sdmodule.io.images import captioned_sheet, contact_sheet, to_images
from sdmodule.io.png_metadata import save_png
from sdmodule.sampling.requests import INPAINT, build_requests
from sdmodule.training.sharding import gathered

TILE = 192
"""Side of an image on the sheet, in pixels."""


@dataclass(frozen=True)
class Inputs:
    """What is sampled at a validation.

    Attributes:
        texts: captions of the sheet.
        prompts: what is sampled for them.
        given: what ``infer`` takes beside each prompt, by its argument.
        beside: images that are shown before each sample.
    """

    texts: Sequence[str]
    prompts: Sequence[str]
    given: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    beside: Sequence[Sequence[Image.Image]] = ()


class ValidationSamples(Callback):
    """Write a captioned sheet ``<step>.png`` of samples at every validation, and log the images.

    Without validation data there are sheets at the same steps, with captions and images of the training data. The last
    step always has a sheet. Each device samples a share. Sampling leaves the random numbers of the training untouched.

    For inpainting, each sample is shown beside its original and its masked original; with a ControlNet, beside its
    control image. These are the same at every validation. A module without ``infer``, such as an autoencoder, is left
    alone.

    Args:
        output_dir: folder of the sheets.
        prompts: prompts to sample; if None, the first captions of the validation data, or of the training data if
            there is none.
        num_prompts: number of captions to sample if ``prompts`` is None.
        seed: seed of the first image.

    Raises:
        SettingsError: for a prompt with an invalid weight, and a number out of range.
    """

    def __init__(
        self, output_dir: str | Path, prompts: Sequence[str] | None = None, num_prompts: int = 4, seed: int = 0
    ) -> None:
        check_int("callbacks.samples.num_prompts", num_prompts)
        check_seed("callbacks.samples.seed", seed)
        self.output_dir = Path(output_dir)
        self.prompts = [request.prompt for request in build_requests(prompts)] if prompts else []
        self.num_prompts = num_prompts
        self.seed = seed
        self._captions: list[str] = []  # of the data
        self._sampled_step = -1
        self._last_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if not stepped or trainer.val_dataloaders or not trainer.enable_validation or not _preview_set(trainer):
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        steps = next((callback.steps for callback in callbacks if isinstance(callback, ValidationInterval)), None)
        if steps and trainer.global_step % steps == 0:
            self._sample_with_ema(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._sample(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._sampled_step:
            self._sample_with_ema(trainer, pl_module)

    def _sample_with_ema(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        with ema.applied(pl_module) if ema else nullcontext():
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "infer"):
            return
        self._sampled_step = trainer.global_step
        inputs: Inputs = trainer.strategy.broadcast(
            self._inputs(trainer, pl_module) if trainer.is_global_zero else None
        )  # type: ignore[assignment]
        with gathered(pl_module), sampling_precision(trainer, pl_module):
            samples = self._sampled(trainer, pl_module, inputs)
        if trainer.is_global_zero:
            self._write_sheet(trainer, inputs, samples)

    def _inputs(self, trainer: Trainer, pl_module: Any) -> Inputs:
        """What is sampled, of the settings and the data of this device."""
        if not self.prompts and not self._captions:
            self._captions = self._first_captions(trainer)
        texts = self.prompts or self._captions
        prompts = self.prompts or [escape_prompt(caption) for caption in texts]
        if pl_module.task == INPAINT:
            return self._masked_images(trainer, texts, prompts)
        if pl_module.controlnet is not None:
            examples = self._examples(trainer, len(prompts))
            controls = [to_images(example["conditioning"][None])[0] for example in examples]
            return Inputs(texts, prompts, {"control": controls}, [controls])
        return Inputs(texts, prompts)

    def _masked_images(self, trainer: Trainer, texts: Sequence[str], prompts: Sequence[str]) -> Inputs:
        """An image of the data for each prompt, and the image masked."""
        originals: list[Image.Image] = []
        masked: list[Image.Image] = []
        masks: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(self.seed)
        for example in self._examples(trainer, len(prompts)):
            image, mask = example["image"][None], example.get("mask")
            mask = draw_masks(1, image.shape[-2:], 0.0, generator) if mask is None else mask[None]
            originals += to_images(image / 2 + 0.5)
            masked += to_images(mask_out(image, mask) / 2 + 0.5)
            masks += mask
        return Inputs(texts, prompts, {"image": originals, "mask": masks}, [originals, masked])

    def _sampled(self, trainer: Trainer, pl_module: Any, inputs: Inputs) -> list[Image.Image]:
        """A sample for each prompt, of which each device makes a share."""
        share = -(-len(inputs.prompts) // trainer.world_size)
        start = share * trainer.global_rank
        own = slice(start, start + share)
        shown = shows_progress(trainer) and trainer.is_global_zero
        samples: list[Image.Image] = []
        if prompts := inputs.prompts[own]:
            given = {name: rows[own] for name, rows in inputs.given.items()}
            samples = pl_module.infer(prompts, seed=self.seed + start, show_progress=shown, **given)["samples"]
        return [image for part in on_all_devices(samples, trainer) for image in part]

    def _write_sheet(self, trainer: Trainer, inputs: Inputs, samples: list[Image.Image]) -> None:
        columns = [*([image.resize(samples[0].size) for image in images] for images in inputs.beside), samples]
        images = samples
        if inputs.beside:
            images = [contact_sheet(list(row), columns=len(columns)) for row in zip(*columns, strict=True)]
        captions = [f"{text} · seed {self.seed + k}" for k, text in enumerate(inputs.texts)]
        self.output_dir.mkdir(parents=True, exist_ok=True)
        file = self.output_dir / f"{trainer.global_step:06d}.png"
        save_png(captioned_sheet(images, captions, len(columns) * TILE), file, {})
        log_images(trainer.loggers, "val/samples", images, captions, trainer.global_step)

    def _examples(self, trainer: Trainer, count: int) -> list[dict[str, torch.Tensor]]:
        """The image tensors of the first ``count`` examples of the data, which repeat if there are fewer."""
        if not trainer.val_dataloaders and (previews := _preview_set(trainer)):
            return [previews[k % len(previews)] for k in range(count)]
        examples: list[dict[str, torch.Tensor]] = []
        batches = iter(trainer.val_dataloaders or trainer.train_dataloader)  # type: ignore[arg-type]
        while len(examples) < count and (batch := next(batches, None)):
            images = {name: rows for name, rows in batch.items() if name != "caption"}
            examples += [{name: rows[k] for name, rows in images.items()} for k in range(len(batch["caption"]))]
        return [examples[k % len(examples)] for k in range(count)]

    def _first_captions(self, trainer: Trainer) -> list[str]:
        if not trainer.val_dataloaders and (previews := _preview_set(trainer)):
            return [previews.caption(k) for k in range(min(self.num_prompts, len(previews)))]
        captions: list[str] = []
        for batch in trainer.val_dataloaders or trainer.train_dataloader:  # type: ignore[union-attr]
            captions += batch["caption"]
            if len(captions) >= self.num_prompts:
                break
        return captions[: self.num_prompts]


def shows_progress(trainer: Trainer) -> bool:
    """Whether the trainer's progress bar is one of ours, whose line the bar of the denoising steps takes meanwhile."""
    return bool(getattr(trainer.progress_bar_callback, "show", False))


def _preview_set(trainer: Trainer) -> Any:
    """The training images without random transforms; None if the data module has none."""
    return getattr(trainer.datamodule, "preview_set", None)  # type: ignore[attr-defined]
