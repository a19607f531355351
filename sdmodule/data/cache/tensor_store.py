"""Tensors on disk under keys, in safetensors files that are only ever added."""

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

SHARD = 256
"""Tensors in a file."""

DAY = 24 * 60 * 60

KEPT = 64 * 2**20
"""Bytes of tensors that stay in memory once they were read: with few images, all of them."""


class TensorStore:
    """A folder of tensors, each found by its key.

    A file is written aside and renamed, so that one that is there is whole, and several processes may add at once.
    Keys are held in memory; tensors are read from their files when asked for, and the first `KEPT` bytes of them once.

    Args:
        folder: where the files are; it is made when something is added.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._kept: dict[str, Tensor] = {}
        self._room = KEPT
        self.refresh()

    def refresh(self) -> None:
        """Look what is there now; a broken file is named and passed over."""
        remove_leftovers(self.folder, older_than=DAY)
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as shard:
                    if not set(shard.keys()) <= (shard.metadata() or {}).keys():
                        raise SafetensorError("no checksums")
                    self._files.update(dict.fromkeys(shard.keys(), file))
            except (SafetensorError, OSError):
                rank_zero_warn(f"{file} is broken and is passed over; what it held is made anew.")

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __getitem__(self, key: str) -> Tensor:
        """A tensor, not to be changed.

        Raises:
            SettingsError: if it is not what was written.
        """
        if key in self._kept:
            return self._kept[key]
        file = self._files[key]
        try:
            if file not in self._open:
                shard = safe_open(file, framework="pt")
                self._open[file] = shard, shard.metadata() or {}
            shard, checksums = self._open[file]
            tensor = shard.get_tensor(key)
            whole = checksum(tensor) == checksums.get(key)
        except (SafetensorError, OSError):
            whole = False
        if not whole:
            raise SettingsError(f"cache.folder: {file} is broken; remove it, and what it held is made anew.")
        if tensor.nbytes <= self._room:
            self._kept[key] = tensor
            self._room -= tensor.nbytes
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        # a process that loads data opens the files itself
        return {**self.__dict__, "_open": {}, "_kept": {}, "_room": KEPT}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors into a file of their own.

        Raises:
            SettingsError: if it cannot be written.
        """
        file = self.folder / f"{fingerprint(*sorted(tensors))}.safetensors"
        own = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as aside:
                save_file(own, aside, metadata={key: checksum(tensor) for key, tensor in own.items()})
        except (OSError, SafetensorError) as error:
            raise SettingsError(
                f"cache.folder: {self.folder} cannot be written ({error}); give a folder with room, or cache=none."
            ) from error
        self._files.update(dict.fromkeys(tensors, file))
        self._open.pop(file, None)
        for key in own:
            self._kept.pop(key, None)

    def fill(self, made: Iterable[Mapping[str, Tensor]]) -> None:
        """Add tensors as they are made; if making them is interrupted, what is made is kept."""
        pending: dict[str, Tensor] = {}
        try:
            for tensors in made:
                pending |= tensors
                if len(pending) >= SHARD:
                    self.add(pending)
                    pending = {}
        finally:
            if pending:
                self.add(pending)


def checksum(tensor: Tensor) -> str:
    """Of a tensor's bytes, which safetensors does not check itself."""
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()):08x}"
