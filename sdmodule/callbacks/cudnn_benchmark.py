"""Let cuDNN find its fastest algorithms of convolution."""

from __future__ import annotations

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override


class CudnnBenchmark(Callback):
    """In a training on a GPU, let cuDNN measure which algorithm of each convolution is fastest.

    It measures for each size of images and each batch size, which pays where all batches are alike: not with
    ``data.buckets``.
    """

    _before: bool | None = None  # what it was set to before the training

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        several_sizes = getattr(trainer.datamodule, "buckets", False)  # type: ignore[attr-defined]
        if trainer.strategy.root_device.type == "cuda" and not several_sizes:
            self._before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._before is not None:
            torch.backends.cudnn.benchmark, self._before = self._before, None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
