"""Keep frozen weights in 16 bits while mixed precision trains."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What each mixed precision computes in."""

STRATEGIES = (SingleDeviceStrategy, DDPStrategy)
"""Strategies under which every device holds whole weights; a subclass may shard them."""


class CastFrozenWeights(Callback):
    """In mixed precision, hold frozen linear and convolution weights in 16 bits during training steps.

    They are back in full precision for validation, at the end, and whenever ``infer`` or ``save_pretrained`` is called.
    A module without ``frozen_weights`` is left alone. See `training.frozen_weights.FrozenWeights`.
    """

    def __init__(self) -> None:
        self._cast: ExitStack | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        dtype = DTYPES.get(str(trainer.precision))
        frozen: Any = getattr(pl_module, "frozen_weights", None)
        if self._cast or frozen is None or dtype is None or type(trainer.strategy) not in STRATEGIES:
            return
        self._cast = ExitStack()
        self._cast.enter_context(frozen.cast(dtype))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._cast is not None:
            cast, self._cast = self._cast, None
            cast.__exit__(type(exception), exception, exception.__traceback__)

    def _end(self) -> None:
        if self._cast is not None:
            self._cast.close()
            self._cast = None
