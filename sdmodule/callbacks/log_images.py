"""Images for whichever logger can hold them."""

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
    "tome_ratio",
    "tome_engine",
    "seconds",
    "image",
)
"""Columns of the table of predictions; images that were repainted have two more."""

INPAINT_COLUMNS = ("input_image", "mask")


def log_images(
    loggers: Iterable[Logger],
    key: str,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    step: int,
    axis: str | None = None,
) -> None:
    """Give images to every logger that can hold them; others are passed over.

    Args:
        loggers: of any kind.
        key: name of the series, the same at every step, so that a slider can go through it.
        images: images of any sizes.
        captions: a line for each.
        step: where in the series they belong.
        axis: the name of what ``step`` counts; optimizer steps if None.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            if axis is None:
                logger.log_image(key, list(images), step=step, caption=list(captions))
            else:
                import wandb

                held = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
                logger.experiment.log({key: held, axis: step})
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, np.asarray(sheet(images, captions)), step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, sheet(images, captions), f"{key}/{step:06d}.png")


def sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """A captioned grid, its images about as large as they are."""
    return captioned_sheet(images, captions, tile=min(max(max(max(image.size) for image in images), 128), 512))


def log_table(loggers: Iterable[Logger], records: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Log the table ``predictions``, a row an image, to W&B, the one that has tables.

    Args:
        loggers: of any kind.
        records: what ``predictions.jsonl`` holds.
        folder: of the run.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and (told := list(records)):
            import wandb

            repainted = any("inpaint" in record for record in told)
            columns = [*COLUMNS, *(INPAINT_COLUMNS if repainted else ())]
            rows = [_row(record, folder, repainted) for record in told]
            logger.experiment.log({"predictions": wandb.Table(columns=columns, data=rows)})


def _row(record: Mapping[str, Any], folder: Path, repainted: bool) -> list[Any]:
    import wandb

    merging = record.get("tome", {"ratio": 0.0, "engine": "none"})
    told = {
        **record,
        "guidance_scale": float(record["guidance_scale"]),
        "tome_ratio": float(merging["ratio"]),
        "tome_engine": merging["engine"],
        "image": wandb.Image(str(folder / record["file"]), caption=f"{record['prompt']} · {record['seed']}"),
    }
    row = [told[name] for name in COLUMNS]
    return [*row, *(wandb.Image(str(folder / record[name])) for name in ("image", "mask"))] if repainted else row
