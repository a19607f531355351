"""Images of a kind, made by the model before it is trained on one thing of that kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from sdmodule.conditioning.text import escape_prompt
from sdmodule.io.png_metadata import save_png
from sdmodule.io.progress import progress


class ClassImages(Callback):
    """Make what is missing of the images that `DreamBoothDataModule` asks for; devices make a share each.

    The image of number k, which its name has, is drawn from seed k, and what an interrupted making left is kept.

    Args:
        batch_size: images at once.
    """

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        files = [file for file in getattr(data, "priors", []) if not file.is_file()]
        trainer.strategy.barrier("prior images counted")
        share = files[trainer.global_rank :: trainer.world_size]
        if share:
            share[0].parent.mkdir(parents=True, exist_ok=True)
            with progress(len(share), f"Making images of {data.class_prompt!r} in {data.class_root}") as on_done:
                for start in range(0, len(share), self.batch_size):
                    batch = share[start : start + self.batch_size]
                    self._make(pl_module, data, batch)
                    on_done(len(batch))
        trainer.strategy.barrier("prior images made")

    def _make(self, module: Any, data: Any, batch: list[Path]) -> None:
        height, width = data.size
        prompt = escape_prompt(data.class_prompt)  # as it is read in training
        made = module.infer(
            [prompt] * len(batch),
            generator=[torch.Generator().manual_seed(int(file.stem.rpartition("-")[2])) for file in batch],
            height=height,
            width=width,
            show_progress=False,
        )
        for file, image in zip(batch, made["samples"], strict=True):
            save_png(image, file, {"prompt": prompt})
