"""Progress of a run: a bar in a terminal, an occasional line anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from contextlib import ExitStack
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks
from torch import Tensor
from typing_extensions import override

from sdmodule.callbacks.timing import TimingLogger
from sdmodule.io.progress import LINE_SECONDS, Progress
from sdmodule.sampling.result import Samples
from sdmodule.sampling.stages import total_steps
from sdmodule.training.host_copy import HostCopy


class ProgressBar(callbacks.ProgressBar):
    """One bar for training (epoch, loss, samples per second, data wait), validation and sampling, with the time left.

    Lightning's own bars count the batches of an epoch; this one counts optimizer steps of the whole training, and
    images. A terminal shows one at a time: validation takes the line of the training until it ends.

    Args:
        show: False shows nothing.
        every: seconds between lines if the output is not a terminal.

    Attributes:
        waits_for_metrics: whether a GPU is waited for in each step to have its metrics; see `log_training`.
    """

    waits_for_metrics = False

    def __init__(self, show: bool = True, every: float = LINE_SECONDS) -> None:
        super().__init__()
        self.show = show
        self.every = every
        self.bar: Progress | None = None
        self.validation: Progress | None = None
        self._step_reports = ExitStack()
        self._batches_done, self._batch_images = 0, 0
        self._loss: HostCopy | None = None

    @override
    def disable(self) -> None:
        self.show = False

    @override
    def enable(self) -> None:
        self.show = True

    def _end(self) -> None:
        self._step_reports.close()
        for bar in (self.validation, self.bar):
            if bar is not None:
                bar.close()
        self.bar = self.validation = None

    # ---------------------------------------------------------------------------------------------- training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.max_steps
        self.bar = Progress("training", steps, "steps", trainer.global_step, self.show, self.every)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None and trainer.global_step > self.bar.done:
            terminal = self.bar.terminal
            self.bar.update(trainer.global_step, lambda: self._training_figures(trainer, pl_module, terminal))

    def _training_figures(self, trainer: Trainer, pl_module: LightningModule, often: bool) -> dict[str, str]:
        figures = {"epoch": epoch_of(trainer)} if trainer.num_training_batches > 1 else {}
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            before, self._loss = self._loss, HostCopy(loss)
            # a bar shows that of its last update, which a GPU has computed meanwhile
            shown = before if often and loss.device.type != "cpu" else self._loss
            if shown is not None:
                figures["loss"] = f"{shown.read():.4f}"
        timing = next((c for c in trainer.callbacks if isinstance(c, TimingLogger)), None)  # type: ignore[attr-defined]
        if timing is not None and timing.steps:
            recent = timing.training_figures(trainer, pl_module, 50)
            figures |= {"samples/s": f"{recent['samples_per_second']:.3g}", "data wait": f"{recent['data_wait']:.0%}"}
        return figures

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    # ---------------------------------------------------------------------------------------------- validation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        batches = int(sum(count for count in counts if math.isfinite(count)))
        self.validation = Progress("validating", batches, "batches", show=self.show, every=self.every, leave=False)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.validation is not None:
            self.validation.update(self.validation.done + 1)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validation is not None:
            self.validation.close()
            self.validation = None
        if self.bar is not None:
            self.bar.redraw()

    # ---------------------------------------------------------------------------------------------- sampling

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done, total = images_of(trainer)
        bar = self.bar = Progress("sampling", total, "images", done, self.show, self.every)
        steps = total_steps(pl_module.parts, pl_module.sampling)  # type: ignore[arg-type]

        def on_step(step: int, latents: Tensor) -> None:
            share = step / (steps + 1) * self._batch_images  # the rest is decoding
            stage = f"{step}/{steps}, decoding" if step == steps else f"{step}/{steps}"
            bar.update(self._batches_done + share, lambda: {"step": stage})

        self._batches_done, self._batch_images = done, 0
        self._step_reports.enter_context(pl_module.step_reports(on_step))  # type: ignore[operator]

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        requests = batch.get("caption", ()) if isinstance(batch, Mapping) else batch
        self._batch_images = sum(getattr(request, "kept", True) for request in requests)

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Samples,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batches_done += sum(request.kept for request in outputs.requests)
        if self.bar is not None:
            self.bar.update(self._batches_done)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()


def epoch_of(trainer: Trainer) -> str:
    """The current epoch, from 1 on, and how many the training has, where that is known: ``3/10``."""
    epoch, batches = trainer.current_epoch + 1, trainer.num_training_batches
    if not batches or not math.isfinite(batches):
        return str(epoch)
    steps = math.ceil(batches / trainer.accumulate_grad_batches)
    return f"{epoch}/{max(epoch, math.ceil(trainer.max_steps / steps))}"


def images_of(trainer: Trainer) -> tuple[int, int]:
    """How many images of a sampling are done before it starts, and how many there are; on this device.

    0 of 0 if the data does not say.
    """
    images: Any = getattr(trainer.predict_dataloaders, "dataset", None)
    if not hasattr(images, "batches"):  # plain prompts
        return 0, len(images) if isinstance(images, Sized) else 0
    wanted = [request for batch in images.batches for request in batch if request.kept]
    left = sum(request.index not in images.done for request in wanted)
    data = trainer.datamodule  # type: ignore[attr-defined]
    done = len(getattr(data, "done", ())) if trainer.world_size == 1 else len(wanted) - left
    return done, done + left
