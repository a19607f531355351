"""Keys and values of the text, computed once for all steps: cross-attention gets the same text at each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from sdmodule.speed.compile import any_length
from sdmodule.speed.offload import bring


class CachedProjection(nn.Module):
    """A stand-in for a key or value projection that returns its cached result.

    Args:
        layer: the projection.
        value: its result ``[B, L, C]``.
    """

    def __init__(self, layer: nn.Module, value: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.value = value

    def forward(self, tokens: Tensor, *_: Any) -> Tensor:
        """The cached result; for fewer rows than B, its last rows, which are the prompts' half."""
        return self.value[-len(tokens) :]


@contextmanager
def text_kv_cache(networks: Sequence[Any], embeddings: Tensor) -> Iterator[None]:
    """Compute keys and values of the text once for all calls of networks inside a ``with`` block.

    Args:
        networks: UNets and ControlNets.
        embeddings: the ``encoder_hidden_states`` of every call, ``[B, L, D]``; a call may also get its last rows.
    """
    for network in networks:
        bring(network)
    layers: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for block in (block for network in networks for block in network.modules()):
            attention = block.attn2 if isinstance(block, BasicTransformerBlock) else None
            if attention is None or attention.norm_cross:
                continue
            for name in ("to_k", "to_v"):
                layer = getattr(attention, name)
                layers.append((attention, name, layer))
                setattr(attention, name, CachedProjection(layer, any_length(layer(embeddings))))
        yield
    finally:
        for attention, name, layer in layers:
            setattr(attention, name, layer)
