"""Embeddings of control images, computed once for all steps: a ControlNet gets the same images at each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class CachedEmbedding(nn.Module):
    """A stand-in for a ControlNet's embedding of control images that runs once for each number of rows.

    Args:
        layer: the embedding.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.values: dict[int, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``[B, C, h, w]`` of images ``[B, 3, H, W]``, those of the first call with as many."""
        if len(images) not in self.values:
            self.values[len(images)] = self.layer(images)
        return self.values[len(images)]


@contextmanager
def hint_cache(controlnets: Sequence[Any]) -> Iterator[None]:
    """Embed control images once for all calls of ControlNets inside a ``with`` block.

    Args:
        controlnets: ControlNets that get the same images at every call; others of the kind are left as they are.
    """
    nets = [net for net in controlnets if hasattr(net, "controlnet_cond_embedding")]
    layers = [net.controlnet_cond_embedding for net in nets]
    try:
        for net, layer in zip(nets, layers, strict=True):
            net.controlnet_cond_embedding = CachedEmbedding(layer)
        yield
    finally:
        for net, layer in zip(nets, layers, strict=True):
            net.controlnet_cond_embedding = layer
