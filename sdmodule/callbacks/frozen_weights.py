"""Frozen weights in the type that they are computed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.speed.layout import tokens_in_place

TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What mixed precision computes in."""

LAYERS = (nn.Linear, nn.Conv2d)
"""Layers whose weights autocast converts."""

STRATEGIES = (SingleDeviceStrategy, DDPStrategy)
"""Those under which a weight is whole on every device; what is made of them may cut it up."""


class CastFrozenWeights(Callback):
    """In mixed precision, keep frozen linear layers and convolutions in 16 bits while steps are taken.

    Autocast converts the weights of these at every step, and what it made of them is kept for the backward pass beside
    the weights themselves. Here they are converted once, to the same numbers; the whole ones wait in the processor's
    memory and are back for validation, at the end, and for ``infer`` and ``save_pretrained`` whenever these are called.
    A network whose convolutions are all frozen has their channels innermost meanwhile, in which they are fastest.

    Not for DoRA, which computes with the weights themselves.
    """

    def __init__(self) -> None:
        self._converted = False
        self._whole: list[tuple[nn.Parameter, Tensor]] = []
        self._switched = ExitStack()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        dtype = TYPES.get(str(trainer.precision))
        if dtype is not None and type(trainer.strategy) in STRATEGIES and not self._converted:
            self._convert(pl_module, dtype)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # a device that is out of memory has no room for them, and the module leaves it next
        self._restore(pl_module, torch.device("cpu"))

    def _convert(self, module: Any, dtype: torch.dtype) -> None:
        self._converted = True
        for name in ("unet", "controlnet", "vae", "text_encoder"):
            network = getattr(module, name, None)
            if network is None or any("lora_magnitude_vector" in key for key, _ in network.named_parameters()):
                continue
            layers = [layer for layer in network.modules() if type(layer) in LAYERS]
            frozen = [weight for layer in layers for weight in layer.parameters() if not weight.requires_grad]
            self._whole += [(weight, weight.data.cpu()) for weight in frozen]
            images = all(not weight.requires_grad for weight in network.parameters() if weight.ndim == 4)
            for weight in frozen:
                weight.data = weight.data.to(dtype)
                if images and weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            if images:
                self._switched.enter_context(tokens_in_place(network))

        @contextmanager
        def whole() -> Iterator[None]:
            self._restore(module)
            try:
                yield
            finally:
                self._convert(module, dtype)

        module.full_precision_weights = whole

    def _restore(self, module: Any, device: torch.device | None = None) -> None:
        self._switched.close()
        for weight, whole in self._whole:
            weight.data = whole.to(device or weight.device)
        self._whole, self._converted = [], False
        module.full_precision_weights = nullcontext
