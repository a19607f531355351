"""Modules that compute the same another way for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def swap_class(kind: type[nn.Module], layers: Iterable[nn.Module], keeps: tuple[str, ...] = ()) -> Iterator[None]:
    """Have modules be of another class inside a ``with`` block: their weights, names and hooks stay as they are.

    Args:
        kind: a class derived from theirs, with nothing to be initialized.
        layers: all of the class that ``kind`` is derived from.
        keeps: attributes in which modules of ``kind`` keep what they make; dropped at the end.
    """
    found = list(layers)
    before = [layer.__class__ for layer in found]
    try:
        for layer in found:
            layer.__class__ = kind
        yield
    finally:
        for layer, own in zip(found, before, strict=True):
            if layer.__class__ is kind:  # and none that it became in between
                layer.__class__ = own
            for name in keeps:
                layer.__dict__.pop(name, None)
