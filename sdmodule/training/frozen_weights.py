"""Frozen weights in the dtype that mixed precision computes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sdmodule.components.checkpoint import Components
from sdmodule.speed.layout import tokens_in_place

LAYERS = (nn.Linear, nn.Conv2d)
"""Layers whose weights autocast converts."""


class FrozenWeights:
    """The frozen linear and convolution weights of some networks, which can be held in 16 bits.

    Autocast converts these weights at every step and keeps the result for the backward pass beside the originals. Here
    they are converted once, to the same numbers, and the originals wait in CPU memory, which is pinned for those of a
    GPU: when they are needed in between, they are copied up without a wait, and nothing is copied down again. A network
    whose convolutions are all frozen is kept in channels_last meanwhile.

    DoRA computes with the weights themselves, so a network with DoRA layers is left as it is.

    Args:
        networks: to convert; None is skipped.
    """

    def __init__(self, networks: Sequence[Any]) -> None:
        self.networks = [network for network in networks if network is not None]
        self.dtype: torch.dtype | None = None
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        self._layouts = ExitStack()

    @classmethod
    def of(cls, parts: Components) -> FrozenWeights:
        """Those of a model, but for a VAE that overflows in float16."""
        networks = [network for network in parts.networks.values() if network is not parts.vae or not parts.upcasts_vae]
        return cls([*networks, parts.controlnet])

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the frozen weights as ``dtype`` inside the block."""
        self._convert(dtype)
        try:
            yield
        except BaseException:
            # a GPU that is out of memory has no room for the originals
            self._restore(torch.device("cpu"))
            raise
        finally:
            self._restore()
            self._originals = []

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Use the original weights inside the block, but for sampling in mixed precision, within `torch.autocast`.

        That would round the originals again at every step, to what `cast` has rounded them to already.
        """
        with nullcontext() if self._autocast_enabled() else self.full_precision():
            yield

    def _autocast_enabled(self) -> bool:
        device = next(self.networks[0].parameters()).device.type
        return device != "cpu" and torch.is_autocast_enabled(device)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Use the original weights inside the block, even within `cast`."""
        dtype = self.dtype
        self._restore()
        try:
            yield
        finally:
            if dtype is not None:
                self._convert(dtype)

    def _convert(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        known = bool(self._originals)
        for network in self.networks:
            if isinstance(network, FSDPModule):  # gathered in 16 bits
                continue
            if any("lora_magnitude_vector" in name for name, _ in network.named_parameters()):
                continue
            layers = [layer for layer in network.modules() if type(layer) in LAYERS]
            frozen = [weight for layer in layers for weight in layer.parameters() if not weight.requires_grad]
            if not known:
                self._originals += [(weight, kept_on_host(weight.data)) for weight in frozen]
            all_convolutions = all(not weight.requires_grad for weight in network.parameters() if weight.ndim == 4)
            for weight in frozen:
                weight.data = weight.data.to(dtype)
                if all_convolutions and weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            if all_convolutions:
                self._layouts.enter_context(tokens_in_place(network))

    def _restore(self, device: torch.device | None = None) -> None:
        """Put the originals back, unless they are there already."""
        self._layouts.close()
        if self.dtype is None:
            return
        for weight, original in self._originals:
            weight.data = original.to(device or weight.device, non_blocking=True)
        self.dtype = None


def kept_on_host(weight: Tensor) -> Tensor:
    """A weight in CPU memory: itself if it is there, else a copy in pinned memory."""
    if weight.device.type != "cuda":
        return weight.cpu()
    return torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
