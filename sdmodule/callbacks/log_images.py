"""Log images to every logger that takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from sdmodule.io.images import captioned_sheet

COLUMNS = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "scheduler",
    "model",
    "family",
    "tome_ratio",
    "tome_engine",
    "seconds",
    "image",
)
"""Columns of the table of predictions."""

INPUT_COLUMNS = {"image": "input_image", "mask": "mask", "control": "control"}
"""Further columns, for images that were made from others: field of a record and name of its column."""


def log_images(
    loggers: Iterable[Logger],
    key: str,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    step: int,
    axis: str | None = None,
) -> None:
    """Log images to every logger that takes them; other loggers are skipped.

    Args:
        loggers: loggers of any kind.
        key: name of the series, the same at every step, so that loggers show a slider.
        images: images of any sizes.
        captions: one line per image.
        step: position in the series.
        axis: name of what ``step`` counts; optimizer steps if None.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            if axis is None:
                logger.log_image(key, list(images), step=step, caption=list(captions))
            else:
                import wandb

                shown = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
                logger.experiment.log({key: shown, axis: step})
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(sheet(images, captions)), step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, sheet(images, captions), f"{key}/{step:06d}.png")


def sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """A captioned grid, its tiles as large as the largest image, within limits."""
    return captioned_sheet(images, captions, tile=min(max(max(max(image.size) for image in images), 128), 512))


def log_table(loggers: Iterable[Logger], records: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Log the table ``predictions``, one row per image, to W&B; other loggers have no tables.

    Args:
        loggers: loggers of any kind.
        records: the lines of ``predictions.jsonl``.
        folder: folder of the run.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and (listed := list(records)):
            import wandb

            inputs = [field for field in INPUT_COLUMNS if any(isinstance(record.get(field), str) for record in listed)]
            columns: list[str | int] = [*COLUMNS, *(INPUT_COLUMNS[field] for field in inputs)]
            rows = [_row(record, folder, inputs) for record in listed]
            logger.experiment.log({"predictions": wandb.Table(columns=columns, data=rows)})


def _row(record: Mapping[str, Any], folder: Path, inputs: Sequence[str]) -> list[Any]:
    import wandb

    merging = record.get("tome", {"ratio": 0.0, "engine": "none"})
    values = {
        **record,
        "guidance_scale": float(record["guidance_scale"]),
        "tome_ratio": float(merging["ratio"]),
        "tome_engine": merging["engine"],
        "image": wandb.Image(str(folder / record["file"]), caption=f"{record['prompt']} · seed {record['seed']}"),
    }
    row = [values.get(name, "") for name in COLUMNS]  # images of earlier versions name no family
    shown = [record[field] if isinstance(record.get(field), str) else None for field in inputs]
    return [*row, *(None if file is None else wandb.Image(str(folder / file)) for file in shown)]
