"""What cross-attention makes of a text is the same at every step: it is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn


class Remembered(nn.Module):
    """In place of a layer: what it gave for a batch, whatever it is given now.

    Args:
        layer: what stood here.
        value: its result ``[B, L, C]``; asked for fewer rows than B, it gives the last ones.
    """

    def __init__(self, layer: nn.Module, value: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.value = value

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        """The remembered result, for as many rows as there are tokens' rows."""
        return self.value[-len(tokens) :]


@contextmanager
def text_kv_cache(unet: Any, embeddings: Tensor) -> Iterator[None]:
    """Compute keys and values of a text once, for all calls of a UNet inside a ``with`` block.

    Args:
        unet: a ``UNet2DConditionModel``.
        embeddings: the ``encoder_hidden_states`` that it will be given, or the last rows of which it will be given,
            ``[B, L, D]``.
    """
    layers: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for block in unet.modules():
            attention = block.attn2 if isinstance(block, BasicTransformerBlock) else None
            if attention is None or attention.norm_cross:
                continue
            for name in ("to_k", "to_v"):
                layer = getattr(attention, name)
                layers.append((attention, name, layer))
                setattr(attention, name, Remembered(layer, layer(embeddings)))
        yield
    finally:
        for attention, name, layer in layers:
            setattr(attention, name, layer)
