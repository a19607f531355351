"""Checkpoints of sharded trainings: folders to which each process writes what it holds.

A folder has what a checkpoint file has: ``checkpoint.pt`` holds all but the sharded tensors, in whose place it has
tensors of their shape without data, and the safetensors files of `torch.distributed.checkpoint` hold these. Any number
of processes can read them, each the shares that it needs.
"""

from __future__ import annotations

import copy
import shutil
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor
from typing_extensions import override

from sdmodule.errors import SettingsError
from sdmodule.io.atomic import move_into_place

INDEX = "checkpoint.pt"
FILES = "files"
"""Where the index holds the sizes of the other files."""


class ShardWriter(HuggingFaceStorageWriter):
    """Writes shards to a temporary folder, and moves it into place once all processes have written theirs.

    Args:
        aside: the temporary folder.
        path: the final one.
        rest: what the index holds.
    """

    def __init__(self, aside: Path, path: Path, rest: dict[str, Any]) -> None:
        super().__init__(str(aside), save_distributed=True)
        self.aside, self.final, self.rest = aside, path, rest

    @override
    def finish(self, metadata: Metadata, results: Any) -> None:
        """Called by one process when all shards are on the disk."""
        super().finish(metadata, results)
        sizes = {file.name: file.stat().st_size for file in self.aside.iterdir()}
        torch.save({**self.rest, FILES: sizes}, self.aside / INDEX)
        move_into_place(self.aside, self.final)


class CheckpointQueue:
    """Writes checkpoints one after another in a thread, while the training goes on.

    Each process copies what it holds to CPU memory first. It waits only if two checkpoints are still being written:
    `TrainingCheckpoint` writes two at a time.

    Args:
        group: all processes, for this purpose alone, with a backend of the CPU.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def save(self, checkpoint: dict[str, Any], path: Path, number: str) -> None:
        """Write a checkpoint soon.

        Args:
            checkpoint: with this process' shards.
            path: the folder.
            number: a name for this write, the same in all processes.

        Raises:
            SettingsError: if an earlier one could not be written.
        """
        self.wait(left=1)
        rest, tensors = split(checkpoint)
        rest, tensors = copy.deepcopy(rest), BlockingAsyncStager().stage(tensors)
        self._pending.append(self._thread.submit(self._write, rest, tensors, path, number))

    def remove(self, path: Path) -> None:
        """Delete a checkpoint once all that were to be written are."""
        self._thread.submit(self._remove, path)

    def _remove(self, path: Path) -> None:
        if not self._failed:  # it may be the last one
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def wait(self, left: int = 0) -> None:
        """Wait until only so many checkpoints are still to be written.

        Raises:
            SettingsError: if one could not be written.
        """
        while len(self._pending) > left:  # all processes look at the same ones, so that all of them fail or none
            self._pending.popleft().result()
        if not left:
            self._thread.submit(int).result()  # after the removals

    def _write(self, rest: dict[str, Any], tensors: dict[str, Any], path: Path, number: str) -> None:
        aside = path.with_name(f".{path.name}.{number}.part")
        try:
            dcp.save(tensors, storage_writer=ShardWriter(aside, path, rest), process_group=self._group)
        except CheckpointException as error:
            self._failed = True
            shutil.rmtree(aside, ignore_errors=True)
            reason = next(iter(error.failures.values()))[0]
            raise SettingsError(
                f"the checkpoint {path} cannot be written ({getattr(reason, 'strerror', None) or reason}); make room, "
                "then resume from the last intact one with ckpt_path=last."
            ) from error


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a checkpoint of a sharded training."""
    return (Path(path) / INDEX).is_file()


def split(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A checkpoint with tensors without data in place of the sharded ones, and these by their place in it."""
    if isinstance(tree, DTensor):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta"), {path: tree.detach()}
    if not isinstance(tree, (Mapping, list, tuple)):
        return tree, {}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    tensors: dict[str, Tensor] = {}
    rest = {}
    for name, value in items:
        rest[name], found = split(value, f"{path}/{name}")
        tensors |= found
    return rest if isinstance(tree, Mapping) else type(tree)(rest.values()), tensors


def fill(tree: Any, make: Callable[[tuple[Any, ...], Tensor], Tensor], path: tuple[Any, ...] = ()) -> Any:
    """A checkpoint's index with a tensor made in place of each without data, given its place and its shape."""
    if isinstance(tree, Tensor):
        return make(path, tree) if tree.is_meta else tree
    if isinstance(tree, Mapping):
        return {name: fill(value, make, (*path, name)) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(fill(value, make, (*path, number)) for number, value in enumerate(tree))
    return tree


def read_index(folder: Path) -> dict[str, Any]:
    """A checkpoint of which the sharded tensors have no data."""
    index = torch.load(folder / INDEX, map_location="cpu", weights_only=True)
    index.pop(FILES)
    return index


def read_folder(folder: Path, make: Callable[[tuple[Any, ...], Tensor], Tensor] | None = None) -> dict[str, Any]:
    """A checkpoint, read by each process for itself.

    Args:
        folder: of the checkpoint.
        make: an empty tensor for one without data at a place, whole or sharded; if None, whole ones in CPU memory.
    """
    make = make or (lambda path, tensor: torch.empty_like(tensor, device="cpu"))
    tensors: dict[str, Any] = {}

    def made(path: tuple[Any, ...], tensor: Tensor) -> Tensor:
        tensors["".join(f"/{name}" for name in path)] = found = make(path, tensor)
        return found

    checkpoint = fill(read_index(folder), made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that each process reads for itself
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return checkpoint


def is_intact_folder(folder: Path) -> bool:
    """Whether a checkpoint's index is intact, and its other files have their sizes."""
    try:
        with zipfile.ZipFile(folder / INDEX) as archive:
            if archive.testzip() is not None:
                return False
        files = torch.load(folder / INDEX, map_location="cpu", mmap=True, weights_only=True)[FILES]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except Exception:  # a damaged archive raises errors of many kinds
        return False
