"""Write the images of a predict run while it samples."""

from __future__ import annotations

import platform
import threading
import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from typing_extensions import override

from sdmodule import __version__
from sdmodule.errors import unwritable
from sdmodule.io.grid import write_grid
from sdmodule.io.png_metadata import save_png
from sdmodule.io.png_scan import PNGScanner
from sdmodule.io.run_folder import (
    IMAGES,
    INPUTS,
    RECORDS,
    append_record,
    gather_records,
    keep_records,
    read_records,
)
from sdmodule.sampling.requests import SampleRequest, image_name, input_name, request_metadata
from sdmodule.sampling.result import Samples


class PredictionWriter(BasePredictionWriter):
    """Write ``images/<index>-<seed>.png``, ``predictions.jsonl`` and, at the end, ``grid.png``.

    Threads write while the next batch is sampled. Every image carries its metadata in PNG text chunks, under the keys
    of ``predictions.jsonl``. Input images, masks and control images go to ``inputs/``, named by a hash of their pixels.
    Each process of a distributed run writes its own images and appends to its own records; the first merges the records
    at the end. A resumed run keeps the records of the images that it keeps.

    Args:
        output_dir: folder of the run.
        write_interval: ``batch``: images are written as soon as their batch is sampled.
        workers: number of writer threads.
    """

    def __init__(self, output_dir: str | Path, write_interval: Literal["batch"] = "batch", workers: int = 2) -> None:
        super().__init__(write_interval)
        self.output_dir = Path(output_dir)
        self.workers = workers
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()  # in the order of submission
        self._sampled: deque[Samples] = deque()  # not submitted yet

    @property
    def records(self) -> Iterator[dict[str, Any]]:
        """The records of ``predictions.jsonl``, one per image."""
        return read_records(self._file(0))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            (self.output_dir / IMAGES).mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero:
                self._keep_records(getattr(trainer, "datamodule", None))
            trainer.strategy.barrier("folder ready")
        except OSError as error:
            raise unwritable(self.output_dir, error.strerror) from error
        self._sampled.clear()
        self._pool = ThreadPoolExecutor(self.workers, "images")

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Samples,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        # images of a GPU are taken once the next batch is under way there
        self._sampled.append(prediction)
        while len(self._sampled) > int(prediction.on_their_way):
            self._submit(trainer, pl_module, self._sampled.popleft())
        self._wait(at_most=8 * self.workers)

    def _submit(self, trainer: Trainer, pl_module: LightningModule, prediction: Samples) -> None:
        """Let the threads write a batch."""
        assert self._pool is not None
        file = self._file(trainer.global_rank)
        shared = {
            **prediction.metadata,
            "precision": str(trainer.precision),
            "device": device_name(pl_module.device),
            "software": f"sdmodule {__version__}, torch {torch.__version__}",
            "seconds": sum(prediction.seconds.values()) / len(prediction.requests),
        }
        for request, image, (row, rows) in zip(
            prediction.requests, prediction.images(), prediction.places, strict=True
        ):
            if request.kept:
                metadata = {**shared, "batch_size": rows, "batch_row": row}
                self._pending.append(self._pool.submit(self._write, file, request, image, metadata))

    def _submit_rest(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self._sampled:
            self._submit(trainer, pl_module, self._sampled.popleft())

    def _write(self, file: Path, request: SampleRequest, image: Image.Image, metadata: dict[str, Any]) -> None:
        """Write an image's files: inputs, image, record, in this order, so that a record's image always exists."""
        start = time.perf_counter()
        metadata = {**request_metadata(request), **metadata}
        for input_image in chain(*request.inputs().values()):
            place = self.output_dir / input_name(input_image)
            if not place.is_file():
                with self._lock:
                    (self.output_dir / INPUTS).mkdir(exist_ok=True)
                    save_png(input_image, place, {})
        name = image_name(request)
        save_png(image, self.output_dir / name, metadata)
        with self._lock:
            append_record(file, {"file": name, **metadata})
            self.seconds += time.perf_counter() - start

    def _wait(self, at_most: int = 0) -> None:
        """Wait until at most ``at_most`` images are left to write.

        Raises:
            SettingsError: if the folder cannot be written.
        """
        while self._pending and (len(self._pending) > at_most or self._pending[0].done()):
            try:
                self._pending.popleft().result()
            except OSError as error:
                raise unwritable(self.output_dir, error.strerror) from error

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._submit_rest(trainer, pl_module)
        self._wait()
        self._close()
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        files = [self._file(rank) for rank in range(trainer.world_size)]
        gather_records(files)
        for file in files[1:]:
            file.unlink(missing_ok=True)
        write_grid(self.output_dir)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:  # finish writing what was sampled
            if self._pool is not None:
                self._submit_rest(trainer, pl_module)
        finally:
            self._close()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _file(self, rank: int) -> Path:
        return self.output_dir / (RECORDS if rank == 0 else f"predictions.{rank}.jsonl")

    def _keep_records(self, data: Any) -> None:
        """Keep the records of images that exist already; one that was written just before a kill has none yet."""
        done: Container[int] = getattr(data, "done", ())
        recorded, scanner = keep_records(self.output_dir, done), PNGScanner()
        for request in getattr(data, "requests", ()):
            if request.index in done and request.index not in recorded:
                name = image_name(request)
                append_record(self._file(0), {"file": name, **scanner.metadata(self.output_dir / name)})


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the architecture of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
