"""Queries, keys and values of self-attention by one matrix product instead of three."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

NAMES = ("to_q", "to_k", "to_v")
JOINED = "qkv"
"""Name of the joined layer in an ``Attention``, where other speed settings find it."""


class JoinedProjections:
    """The three projections of a layer, computed when the first is asked for.

    Args:
        layer: all three, one after the other.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._tokens: Tensor | None = None
        self._made: tuple[Tensor, ...] = ()

    def part(self, tokens: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2) of tokens ``[B, L, C]``, a view of the three: ``[B, L, D]``."""
        if which == 0:
            self._tokens, self._made = tokens, self.layer(tokens).chunk(3, dim=-1)
        elif tokens is not self._tokens:  # keys and values of other tokens than the queries'
            weight, bias = (
                None if one is None else one.chunk(3)[which] for one in (self.layer.weight, self.layer.bias)
            )
            return F.linear(tokens, weight, bias)  # type: ignore[arg-type]
        result = self._made[which]
        if which == 2:
            self._tokens, self._made = None, ()
        return result


class Projection(nn.Module):
    """One of three joined projections, in the place of a linear layer.

    Args:
        joined: all of them.
        which: its number.
    """

    def __init__(self, joined: JoinedProjections, which: int) -> None:
        super().__init__()
        self.joined = joined
        self.which = which

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        """Tokens ``[B, L, C]`` to ``[B, L, D]``."""
        return self.joined.part(tokens, self.which)


@contextmanager
def fused_qkv(unet: nn.Module) -> Iterator[None]:
    """Join the projections of a UNet's self-attention inside a ``with`` block; results differ by rounding.

    The weights share memory with the joined ones, so that it takes no more of it; they must not change meanwhile.

    Args:
        unet: a ``UNet2DConditionModel``; layers with adapters or hooks stay as they are.
    """
    attentions = [block.attn1 for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    chosen = [attention for attention in attentions if _can_join(attention)]
    before = [[getattr(attention, name) for name in NAMES] for attention in chosen]
    try:
        for attention, layers in zip(chosen, before, strict=True):
            joined = _joined(layers)
            setattr(attention, JOINED, joined.layer)
            for which, name in enumerate(NAMES):
                setattr(attention, name, Projection(joined, which))
        yield
    finally:
        for attention, layers in zip(chosen, before, strict=True):
            if hasattr(attention, JOINED):
                delattr(attention, JOINED)
            for name, layer in zip(NAMES, layers, strict=True):
                setattr(attention, name, layer)
                for parameter in layer.parameters():
                    if parameter.untyped_storage().nbytes() > parameter.nbytes:
                        parameter.data = parameter.data.clone()


def _joined(layers: list[nn.Linear]) -> JoinedProjections:
    with torch.device("meta"):
        layer = nn.Linear(layers[0].in_features, sum(one.out_features for one in layers), layers[0].bias is not None)
    for name, _ in list(layer.named_parameters()):
        parts = [getattr(one, name) for one in layers]
        whole = torch.cat([part.data for part in parts])
        setattr(layer, name, nn.Parameter(whole, requires_grad=False))
        for part, shared in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = shared
    return JoinedProjections(layer.train(layers[0].training))


def _can_join(attention: Any) -> bool:
    layers = [getattr(attention, name) for name in NAMES]
    plain = all(
        type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers
    )
    if not plain:
        return False
    alike = {(layer.in_features, layer.out_features, layer.bias is None, layer.weight.dtype) for layer in layers}
    return len(alike) == 1
