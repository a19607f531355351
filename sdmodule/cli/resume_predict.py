"""Which images of a predict run exist already, so that ``resume=true`` samples only the others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from sdmodule.callbacks.timing_figures import on_all_devices
from sdmodule.errors import SettingsError, unwritable
from sdmodule.io.index_set import IndexSet
from sdmodule.io.png_scan import PNGScanner
from sdmodule.io.run_folder import IMAGES
from sdmodule.sampling.requests import SampleRequest, image_name, request_metadata

NOT_COMPARED = frozenset({"seconds", "device", "software", "batch_size", "batch_row", "family"})
"""Metadata that say how an image was computed, or follow from others: a resumed run may differ in them."""


class FinishedImages:
    """The images that an earlier run finished; a damaged one counts as missing.

    The metadata in the images decide, not ``predictions.jsonl``: a run that was killed may not have written its
    records. Images are read one at a time, and of each only its index is remembered.

    Args:
        folder: folder of the earlier run.
        requests: the requests of this run, whose indices follow on one another.
        metadata: the settings of this run that all its images share.
    """

    def __init__(self, folder: Path, requests: Sequence[SampleRequest], metadata: Mapping[str, Any]) -> None:
        self.folder = folder
        self.requests = requests
        self.metadata = metadata
        self._scanner = PNGScanner()

    def files(self) -> Iterator[str]:
        """Names of the PNG files in the folder, damaged ones too."""
        if (self.folder / IMAGES).is_dir():
            with os.scandir(self.folder / IMAGES) as entries:
                yield from (entry.name for entry in entries if entry.name.endswith(".png"))

    def find(self, rank: int = 0, ranks: int = 1) -> IndexSet:
        """The indices of the finished images, or of one process's share of them.

        Raises:
            SettingsError: if an image in the folder was requested with other settings, or is not requested at all.
        """
        self._check_requested(rank, ranks)
        found = IndexSet()
        for request in self.requests[rank::ranks]:
            name = image_name(request)
            metadata = self._read(name)
            if metadata is not None:
                self._check_same(name, metadata, {**request_metadata(request), **self.metadata})
                found.add(request.index)
        return found

    def _read(self, name: str) -> dict[str, Any] | None:
        """The metadata of an image; None if it is missing or damaged, or no image of predict."""
        try:
            return self._scanner.metadata(self.folder / name)
        except (SettingsError, OSError):
            return None

    def _check_requested(self, rank: int, ranks: int) -> None:
        """Check that the folder has no images but those of this run."""
        others = sorted(name for name in self.files() if not self._is_requested(name))
        for name in others[rank::ranks]:
            if self._read(f"{IMAGES}/{name}") is not None:
                raise SettingsError(
                    f"resume=true: output_dir={self.folder} contains {IMAGES}/{name}, which this run does not request; "
                    "give the prompts and the seed of the run that was started there, or another output_dir."
                )

    def _is_requested(self, name: str) -> bool:
        found = re.fullmatch(r"(\d{5,})-\d+\.png", name)
        position = int(found[1]) - self.requests[0].index if found else -1
        return 0 <= position < len(self.requests) and image_name(self.requests[position]) == f"{IMAGES}/{name}"

    def _check_same(self, name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for key in dict.fromkeys((*wanted, *found)):
            if key not in NOT_COMPARED and found.get(key) != wanted.get(key):
                raise SettingsError(
                    f"resume=true: {name} in output_dir={self.folder} has {key}={found.get(key)!r}, but this run has "
                    f"{key}={wanted.get(key)!r}; give the settings of the run that was started there, or another "
                    "output_dir."
                )


class SharedSearch(Callback):
    """Search for finished images in a run of several processes, each its share, once all of them have started.

    Args:
        finished: what is searched.
        data: data module, which is told of the images.
        then: called when all of them fit the run.
    """

    def __init__(self, finished: FinishedImages, data: Any, then: Callable[[], None]) -> None:
        self.finished = finished
        self.data = data
        self.then = then

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found, problem = IndexSet(), ""
        try:
            found = self.finished.find(trainer.global_rank, trainer.world_size)
        except SettingsError as error:  # the others must not wait for this process
            problem = str(error)
        except OSError as error:
            problem = str(unwritable(self.finished.folder, error.strerror))
        for others, told in on_all_devices((found, problem), trainer):
            if told:
                raise SettingsError(told)
            self.data.done.update(others)
        self.then()
