"""Keep frozen weights in 16 bits while mixed precision trains, and sample in that precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override

from sdmodule.training.frozen_weights import FrozenWeights
from sdmodule.training.sharded_strategy import FullyShardedStrategy

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What each mixed precision computes in."""

STRATEGIES = (SingleDeviceStrategy, DDPStrategy, FullyShardedStrategy)
"""Strategies of which it is known which weights every device holds whole; a subclass may shard others."""


class CastFrozenWeights(Callback):
    """In mixed precision, hold frozen linear and convolution weights in 16 bits during training steps.

    They are back in full precision at the end, whenever ``infer`` or ``save_pretrained`` is called, and, on a CPU, for
    validation; on a GPU validation computes with the 16 bits that autocast would round to anyway. A module without
    ``frozen_weights`` is left alone. See `training.frozen_weights.FrozenWeights`.
    """

    def __init__(self) -> None:
        self._cast: ExitStack | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._cast is None:
            self._cast = ExitStack()
            self._cast.enter_context(frozen_weights_cast(trainer, pl_module))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.root_device.type == "cpu":
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


def frozen_weights_cast(trainer: Trainer, module: Any) -> AbstractContextManager[None]:
    """Hold frozen weights in the 16 bits of mixed precision inside a ``with`` block, where a module has some whole."""
    dtype = DTYPES.get(str(trainer.precision))
    frozen: FrozenWeights | None = getattr(module, "frozen_weights", None)
    if frozen is None or frozen.dtype is not None or dtype is None or type(trainer.strategy) not in STRATEGIES:
        return nullcontext()
    return frozen.cast(dtype)


@contextmanager
def sampling_precision(trainer: Trainer, module: Any) -> Iterator[None]:
    """Sample in the mixed precision of a training inside the block, if it is on a GPU; on a CPU in float32."""
    device, dtype = trainer.strategy.root_device.type, DTYPES.get(str(trainer.precision))
    if device == "cpu" or dtype is None:
        yield
        return
    with frozen_weights_cast(trainer, module), torch.autocast(device, dtype):
        yield
