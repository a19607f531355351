"""Modules that take another class, and so another ``forward``, inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def swap_class(kind: type[nn.Module], layers: Iterable[nn.Module], keeps: tuple[str, ...] = ()) -> Iterator[None]:
    """Change the class of modules inside a ``with`` block; their weights, names and hooks stay.

    Args:
        kind: a subclass of the modules' class that needs no initialization.
        layers: modules of exactly the class that ``kind`` derives from.
        keeps: attributes in which modules of ``kind`` cache values; deleted at the end.
    """
    found = list(layers)
    before = [layer.__class__ for layer in found]
    try:
        for layer in found:
            layer.__class__ = kind
        yield
    finally:
        for layer, own in zip(found, before, strict=True):
            if layer.__class__ is kind:  # not a class that was set inside the block
                layer.__class__ = own
            for name in keeps:
                layer.__dict__.pop(name, None)
