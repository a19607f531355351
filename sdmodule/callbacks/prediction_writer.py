"""Write the pictures of a predict run, as they are made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typing_extensions import override

from sdmodule.pictures import captioned_sheet
from sdmodule.samples import Samples

SHEET_LIMIT = 64
"""Pictures on the contact sheet; a larger run shows its first ones."""


class PredictionWriter(BasePredictionWriter):
    """Write ``images/<index>-<seed>.png``, ``predictions.jsonl`` and, at the end, ``grid.png``.

    Every picture carries the facts of its making in PNG text chunks, under the names that ``predictions.jsonl`` uses.

    Args:
        output_dir: folder of the run.
        write_interval: only ``batch`` makes sense: what is made is written at once.
    """

    def __init__(self, output_dir: str | Path, write_interval: Literal["batch"] = "batch") -> None:
        super().__init__(write_interval)
        self.output_dir = Path(output_dir)
        self.seconds = 0.0

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.output_dir / "images").mkdir(parents=True, exist_ok=True)
        self._records(trainer.global_rank).unlink(missing_ok=True)

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
        start = time.perf_counter()
        each = sum(prediction.seconds.values()) / len(prediction.requests)
        with self._records(trainer.global_rank).open("a", encoding="utf-8") as records:
            for request, image in zip(prediction.requests, prediction.images(), strict=True):
                facts = {
                    "index": request.index,
                    "prompt": request.prompt,
                    "negative_prompt": request.negative_prompt,
                    "seed": request.seed,
                    **prediction.facts,
                }
                name = f"images/{request.index:05d}-{request.seed}.png"
                save_png(image, self.output_dir / name, facts)
                records.write(json.dumps({"file": name, **facts, "seconds": each}, ensure_ascii=False) + "\n")
        self.seconds += time.perf_counter() - start

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("predictions written")
        if not trainer.is_global_zero:
            return
        files = [self._records(rank) for rank in range(trainer.world_size)]
        lines = [line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()]
        # a distributed sampler repeats pictures to give every rank the same number
        records = {record["index"]: record for record in map(json.loads, lines)}
        ordered = [records[index] for index in sorted(records)]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in ordered)
        (self.output_dir / "predictions.jsonl").write_text(text, encoding="utf-8")
        for file in files[1:]:
            file.unlink(missing_ok=True)
        self._write_sheet(ordered[:SHEET_LIMIT])

    def _write_sheet(self, records: Sequence[dict[str, Any]]) -> None:
        images = [Image.open(self.output_dir / record["file"]) for record in records]
        captions = [f"{record['prompt']} · {record['seed']}" for record in records]
        captioned_sheet(images, captions).save(self.output_dir / "grid.png")

    def _records(self, rank: int) -> Path:
        return self.output_dir / ("predictions.jsonl" if rank == 0 else f"predictions.{rank}.jsonl")


def save_png(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Write a picture with its facts as PNG text, aside first, so that no half-written picture is ever seen."""
    text = PngInfo()
    for name, value in facts.items():
        text.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    aside = path.with_suffix(".part")
    image.save(aside, format="PNG", pnginfo=text)
    os.replace(aside, path)
