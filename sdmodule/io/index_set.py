"""Indices of images as a set that takes a byte for each image of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class IndexSet:
    """A set of indices, from 0 on.

    Args:
        indices: those in the set at first.
    """

    def __init__(self, indices: Iterable[int] = ()) -> None:
        self._flags = bytearray()
        self.update(indices)

    def add(self, index: int) -> None:
        """Put an index into the set."""
        if index >= len(self._flags):
            self._flags.extend(bytes(index + 1 - len(self._flags)))
        self._flags[index] = 1

    def update(self, indices: Iterable[int]) -> None:
        """Put several indices into the set."""
        for index in indices:
            self.add(index)

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < len(self._flags) and self._flags[index] == 1

    def __len__(self) -> int:
        return self._flags.count(1)

    def __iter__(self) -> Iterator[int]:
        return (index for index, flag in enumerate(self._flags) if flag)
