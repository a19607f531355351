"""Weights in the order in which oneDNN reads them, laid out once instead of at every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class PackedConv2d(nn.Conv2d):
    """A convolution with its weight packed; one becomes it, and ceases, by its ``__class__``."""

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of ``[B, C, h, w]``."""
        shape = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(input, self.packed, self.bias, *shape, "none", [], "")


class PackedLinear(nn.Linear):
    """A linear layer with its weight packed."""

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The product for ``[..., C]``."""
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


PACKED: dict[type, type] = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}


def packable(layer: nn.Module) -> bool:
    """Whether a layer is one that oneDNN computes as it stands, in a precision that this processor has."""
    if type(layer) is nn.Conv2d:
        return not isinstance(layer.padding, str) and layer.padding_mode == "zeros" and _computed(layer.weight)
    return type(layer) is nn.Linear and _computed(layer.weight)


def _computed(weight: Tensor) -> bool:
    bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.device.type == "cpu" and (weight.dtype == torch.float32 or bfloat16)


@contextmanager
def weights_packed(*modules: nn.Module) -> Iterator[None]:
    """Pack the weights of convolutions and linear layers inside a ``with`` block, which takes as much memory again.

    Does nothing on a GPU, nor where torch is without oneDNN.

    Args:
        modules: their weights are not to be changed inside the block.
    """
    layers: list[tuple[Any, type]] = []
    try:
        every: list[Any] = [layer for module in modules for layer in module.modules()]
        for layer in every:
            if not torch.backends.mkldnn.is_available() or not packable(layer):
                continue
            weight, kind = layer.weight.detach(), type(layer)
            if kind is nn.Conv2d:
                shape = layer.padding, layer.stride, layer.dilation, layer.groups
                layer.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *shape)
            else:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            layers.append((layer, kind))
            layer.__class__ = PACKED[kind]
        yield
    finally:
        for layer, kind in layers:
            layer.__class__ = kind
            del layer.packed
