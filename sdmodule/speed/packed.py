"""Weights kept in the order in which they are multiplied.

oneDNN, by which torch convolves on CPU, and multiplies in bfloat16, works on weights in an order of its own, and torch
has them put into it anew at every call. For layers of many channels and few pixels that takes as long as the products.
What ``torch.compile`` calls freezing keeps such weights in compiled models; here layers keep them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override


def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this processor, keeps weights of a type in that order."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def packed_convolutions(model: nn.Module) -> Iterator[None]:
    """Have the convolutions of a model in bfloat16 keep their weights in order, inside a ``with`` block.

    Their results were equal to the bit wherever that was tried. Weights must not change meanwhile: a copy of them is
    made at the first call. In float32 products take so much longer that nothing is won, and nothing is done.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Conv2d and _can_be_packed(layer)]
    try:
        for layer in layers:
            layer.__class__ = PackedConv2d
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Conv2d
            layer.__dict__.pop("packed", None)


def _can_be_packed(layer: nn.Conv2d) -> bool:
    dtype, padded = layer.weight.dtype, layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return dtype == torch.bfloat16 and packs(dtype) and padded


class PackedConv2d(nn.Conv2d):
    """A ``Conv2d`` whose weights are in order; one becomes it, and ceases, by its ``__class__``."""

    packed: Tensor | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Convolve a picture ``[B, C, h, w]``; the result has its channels innermost."""
        if input.dtype != torch.bfloat16 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        settings: Any = (self.padding, self.stride, self.dilation, self.groups)
        if self.packed is None:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            self.packed = reorder(self.weight.contiguous().to_mkldnn(), *settings, input.shape)
        return torch.ops.mkldnn._convolution_pointwise(input, self.packed, self.bias, *settings, "none", [], "")


def packed_linear(tokens: Tensor, layer: Any) -> Tensor:
    """What a linear layer gives for tokens ``[B, L, C]``, without gradients; ``layer.packed`` keeps ordered weights.

    Besides, torch would write the bias into the whole result before it adds the product.
    """
    if layer.packed is None:
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.contiguous(), tokens[..., 0].numel())
    return torch.ops.mkldnn._linear_pointwise(tokens, layer.packed, layer.bias, "none", [], "")
