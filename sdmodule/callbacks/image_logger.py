"""Log the images of a predict run."""

from __future__ import annotations

from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from sdmodule.callbacks.log_images import log_images, log_table
from sdmodule.callbacks.prediction_writer import PredictionWriter
from sdmodule.errors import check_int
from sdmodule.sampling.result import Samples


class ImageLogger(Callback):
    """Log each batch's images as ``predict/samples``, against the number of images so far, and a table at the end.

    Goes after `PredictionWriter`, whose records are the table's rows. The images of validations are logged by
    `ValidationSamples`.

    Args:
        most: largest number of images that are logged per batch.

    Raises:
        SettingsError: if it is not a whole number above 0.
    """

    def __init__(self, most: int = 16) -> None:
        check_int("callbacks.images.most", most)
        self.most = most
        self.sampled = 0
        self._not_logged: deque[Samples] = deque()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._not_logged.clear()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.define_metric("predict/images")
                logger.experiment.define_metric("predict/*", step_metric="predict/images")

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
        if not trainer.is_global_zero or not trainer.loggers:
            return
        # images of a GPU are taken once the next batch is under way there
        self._not_logged.append(outputs)
        while len(self._not_logged) > int(outputs.on_their_way):
            self._log(trainer, self._not_logged.popleft())

    def _log(self, trainer: Trainer, sampled: Samples) -> None:
        pairs = zip(sampled.requests, sampled.images(), strict=True)
        kept = [(request, image) for request, image in pairs if request.kept]
        self.sampled += len(kept)
        images = [image for _, image in kept[: self.most]]
        captions = [f"{request.prompt} · seed {request.seed}" for request, _ in kept[: self.most]]
        log_images(trainer.loggers, "predict/samples", images, captions, self.sampled, axis="predict/images")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        while self._not_logged:
            self._log(trainer, self._not_logged.popleft())
        for writer in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(writer, PredictionWriter):
                log_table(trainer.loggers, writer.records, writer.output_dir)
