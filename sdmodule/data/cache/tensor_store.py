"""A key-value store of tensors on disk, in safetensors files that are only ever added."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.io.atomic import atomic_write, remove_leftovers
from sdmodule.io.fingerprint import SIZE, fingerprint

TENSORS_PER_FILE = 256

DAY = 24 * 60 * 60

MEMORY_BYTES = 64 * 2**20
"""Bytes of tensors that stay in memory once they are read: a small data set fits completely."""

KEY = f"S{SIZE}"
"""Type of hashes of keys; they all have this length, so that zeros at the end do not matter."""

MAX_OPEN_FILES = 1000
"""Files that stay open, each mapped into memory; Linux allows a process 65,530 maps."""


class TensorStore:
    """A folder of tensors, each found by its key.

    Files are written atomically, so several processes may add at the same time. Hashes of the keys are held in memory.
    Tensors are read when they are asked for; the first `MEMORY_BYTES` of them stay in memory.

    Args:
        folder: where the files are; created by the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._paths: list[Path] = []
        self._index = _Index()
        self._added: dict[str, tuple[int, int]] = {}  # since the last `refresh`: number of the file, and checksum
        self._open: dict[int, Any] = {}  # the most recently used last
        self._in_memory: dict[str, Tensor] = {}
        self._free_bytes = MEMORY_BYTES
        self.refresh()

    def refresh(self) -> None:
        """Read the keys of all files; a corrupt file is skipped with a warning."""
        remove_leftovers(self.folder, older_than=DAY)
        self._paths, self._open, self._added = sorted(self.folder.glob("*.safetensors")), {}, {}
        found = []
        for number, file in enumerate(self._paths):
            try:
                with safe_open(file, framework="pt") as shard:
                    checksums = shard.metadata() or {}
                    keys = list(shard.keys())
                    if not set(keys) <= checksums.keys():
                        raise SafetensorError("no checksums")
                    found.append(_Index.of(keys, number, [_parsed(checksums[key]) for key in keys]))
            except (SafetensorError, OSError):
                rank_zero_warn(f"{file} is corrupt and was skipped; its tensors are computed again.")
        self._index = _Index.joined(found)

    def __contains__(self, key: str) -> bool:
        return key in self._added or self._index.find(key) is not None

    def __getitem__(self, key: str) -> Tensor:
        """A tensor; do not modify it in place.

        Raises:
            SettingsError: if its checksum differs from the one that was written.
        """
        if key in self._in_memory:
            return self._in_memory[key]
        found = self._added.get(key) or self._index.find(key)
        if found is None:
            raise KeyError(key)
        number, wanted = found
        file = self._paths[number]
        try:
            tensor = self._opened(number).get_tensor(key)
            intact = checksum(tensor) == wanted
        except (SafetensorError, OSError):
            intact = False
        if not intact:
            raise SettingsError(f"cache.folder: {file} is corrupt; delete it, and its tensors are computed again.")
        if tensor.nbytes <= self._free_bytes:
            self._in_memory[key] = tensor
            self._free_bytes -= tensor.nbytes
        return tensor

    def _opened(self, number: int) -> Any:
        """A file that stays open; the one that was not used for longest is closed for it."""
        shard = self._open.pop(number, None)
        if shard is None:
            shard = safe_open(self._paths[number], framework="pt")
        self._open[number] = shard
        if len(self._open) > MAX_OPEN_FILES:
            del self._open[next(iter(self._open))]
        return shard

    def __getstate__(self) -> dict[str, Any]:
        # each data loading worker opens the files itself
        return {**self.__dict__, "_open": {}, "_in_memory": {}, "_free_bytes": MEMORY_BYTES}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to a new file.

        Raises:
            SettingsError: if it cannot be written.
        """
        file = self.folder / f"{fingerprint(*sorted(tensors))}.safetensors"
        copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        checksums = {key: checksum(tensor) for key, tensor in copies.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as aside:
                save_file(copies, aside, metadata={key: f"{value:08x}" for key, value in checksums.items()})
        except (OSError, SafetensorError) as error:
            raise SettingsError(
                f"cache.folder: {self.folder} cannot be written ({error}); give a folder with free space, or set "
                "cache=none."
            ) from error
        number = len(self._paths)
        self._paths.append(file)
        for key, value in checksums.items():
            self._added[key] = number, value
            self._in_memory.pop(key, None)

    def fill(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Write tensors as they are computed; an interruption keeps what was computed before it."""
        pending: dict[str, Tensor] = {}
        try:
            for tensors in batches:
                pending |= tensors
                if len(pending) >= TENSORS_PER_FILE:
                    self.add(pending)
                    pending = {}
        finally:
            if pending:
                self.add(pending)


@dataclass
class _Index:
    """Where tensors are, in columns sorted by key; a Python object for each would grow every loading process.

    Attributes:
        keys: hashes of the keys, ``[N]``.
        files: numbers of the files, ``[N]``.
        checksums: of the tensors, ``[N]``; -1 for one that is malformed.
    """

    keys: NDArray[np.bytes_] = field(default_factory=lambda: np.zeros(0, KEY))
    files: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    checksums: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, keys: Sequence[str], file: int, checksums: Sequence[int]) -> _Index:
        """The tensors of one file."""
        hashes = np.array([_hashed(key) for key in keys], KEY)
        return cls(hashes, np.full(len(keys), file, np.int32), np.array(checksums, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[_Index]) -> _Index:
        """The tensors of all files; of two with one key, that of the later file."""
        if not parts:
            return cls()
        keys = np.concatenate([part.keys for part in parts])
        order = keys.argsort(kind="stable")
        files = np.concatenate([part.files for part in parts])
        return cls(keys[order], files[order], np.concatenate([part.checksums for part in parts])[order])

    def find(self, key: str) -> tuple[int, int] | None:
        """The number of a tensor's file and its checksum; None if it is in none."""
        wanted = np.array(_hashed(key), KEY)
        place = int(self.keys.searchsorted(wanted, side="right")) - 1
        if place < 0 or self.keys[place] != wanted:
            return None
        return int(self.files[place]), int(self.checksums[place])


def _hashed(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=SIZE).digest()


def _parsed(text: str) -> int:
    """The checksum that a file gives; -1 if it is malformed, which no tensor's is."""
    return int(text, 16) if re.fullmatch("[0-9a-f]{8}", text) else -1


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes; safetensors itself checks none."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
