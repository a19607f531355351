"""Frozen weights in the type that they are computed in."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.speed.layout import tokens_in_place

TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What mixed precision computes in."""

LAYERS = (nn.Linear, nn.Conv2d)
"""Layers whose weights autocast converts."""


class FrozenWeights(Callback):
    """In mixed precision, keep frozen linear layers and convolutions in 16 bits while steps are taken.

    Autocast converts the weights of these at every step, and what it made of them is kept for the backward pass beside
    the weights themselves. Here they are converted once, to the same numbers; the whole ones wait in the processor's
    memory and are back for validation, pictures, and what is written. A network whose convolutions are all frozen has
    their channels innermost meanwhile, in which they are fastest.

    Not for DoRA, which computes with the weights themselves, nor for strategies that shard them.
    """

    def __init__(self) -> None:
        self._whole: list[tuple[nn.Parameter, Tensor]] = []
        self._switched = ExitStack()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._convert(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._convert(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _convert(self, trainer: Trainer, module: Any) -> None:
        dtype = TYPES.get(str(trainer.precision))
        if dtype is None or not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            return
        for name in ("unet", "controlnet", "vae", "text_encoder"):
            network = getattr(module, name, None)
            if network is None or any("lora_magnitude_vector" in key for key, _ in network.named_parameters()):
                continue
            layers = [layer for layer in network.modules() if type(layer) in LAYERS]
            frozen = [weight for layer in layers for weight in layer.parameters() if not weight.requires_grad]
            self._whole += [(weight, weight.data.cpu()) for weight in frozen]
            pictures = all(not weight.requires_grad for weight in network.parameters() if weight.ndim == 4)
            for weight in frozen:
                weight.data = weight.data.to(dtype)
                if pictures and weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            if pictures:
                self._switched.enter_context(tokens_in_place(network))

    def _restore(self) -> None:
        self._switched.close()
        for weight, whole in self._whole:
            weight.data = whole.to(weight.device)
        self._whole = []
