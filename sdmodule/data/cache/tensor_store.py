"""A key-value store of tensors on disk, in safetensors files that are only ever added."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.io.atomic import atomic_write, remove_leftovers
from sdmodule.io.fingerprint import fingerprint

TENSORS_PER_FILE = 256

DAY = 24 * 60 * 60

MEMORY_BYTES = 64 * 2**20
"""Bytes of tensors that stay in memory once they are read: a small data set fits completely."""


MAX_OPEN_FILES = 1000
"""Files that stay open, each mapped into memory; Linux allows a process 65,530 maps."""


class TensorStore:
    """A folder of tensors, each found by its key.

    Files are written atomically, so several processes may add at the same time. Keys are held in memory. Tensors are
    read when they are asked for; the first `MEMORY_BYTES` of them stay in memory.

    Args:
        folder: where the files are; created by the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}  # the most recently used last
        self._in_memory: dict[str, Tensor] = {}
        self._free_bytes = MEMORY_BYTES
        self.refresh()

    def refresh(self) -> None:
        """Read the keys of all files; a corrupt file is skipped with a warning."""
        remove_leftovers(self.folder, older_than=DAY)
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as shard:
                    if not set(shard.keys()) <= (shard.metadata() or {}).keys():
                        raise SafetensorError("no checksums")
                    self._files.update(dict.fromkeys(shard.keys(), file))
            except (SafetensorError, OSError):
                rank_zero_warn(f"{file} is corrupt and was skipped; its tensors are computed again.")

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __getitem__(self, key: str) -> Tensor:
        """A tensor; do not modify it in place.

        Raises:
            SettingsError: if its checksum differs from the one that was written.
        """
        if key in self._in_memory:
            return self._in_memory[key]
        file = self._files[key]
        try:
            shard, checksums = self._opened(file)
            tensor = shard.get_tensor(key)
            intact = checksum(tensor) == checksums.get(key)
        except (SafetensorError, OSError):
            intact = False
        if not intact:
            raise SettingsError(f"cache.folder: {file} is corrupt; delete it, and its tensors are computed again.")
        if tensor.nbytes <= self._free_bytes:
            self._in_memory[key] = tensor
            self._free_bytes -= tensor.nbytes
        return tensor

    def _opened(self, file: Path) -> Any:
        """A file that stays open, and its checksums; the one that was not used for longest is closed for it."""
        found = self._open.pop(file, None)
        if found is None:
            shard = safe_open(file, framework="pt")
            found = shard, shard.metadata() or {}
        self._open[file] = found
        if len(self._open) > MAX_OPEN_FILES:
            del self._open[next(iter(self._open))]
        return found

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as aside:
                save_file(copies, aside, metadata={key: checksum(tensor) for key, tensor in copies.items()})
        except (OSError, SafetensorError) as error:
            raise SettingsError(
                f"cache.folder: {self.folder} cannot be written ({error}); give a folder with free space, or set "
                "cache=none."
            ) from error
        self._files.update(dict.fromkeys(tensors, file))
        self._open.pop(file, None)
        for key in copies:
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


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes; safetensors itself checks none."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()):08x}"
