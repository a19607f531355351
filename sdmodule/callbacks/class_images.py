"""DreamBooth's class images, sampled from the model before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from sdmodule.callbacks.frozen_weights import sampling_precision
from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.errors import check_int
from sdmodule.io.png_metadata import save_png
from sdmodule.io.progress import progress
from sdmodule.training.sharding import gathered


class ClassImages(Callback):
    """Sample the class images that `DreamBoothDataModule` is missing, each device a share of them.

    Image k, named by its number, is drawn from seed k. Images that an interrupted run left are kept.

    Args:
        batch_size: images sampled at once.

    Raises:
        SettingsError: if it is not a whole number above 0.
    """

    def __init__(self, batch_size: int = 4) -> None:
        check_int("callbacks.prior.batch_size", batch_size)
        self.batch_size = batch_size

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        files = [file for file in getattr(data, "priors", []) if not file.is_file()]
        trainer.strategy.barrier("class images counted")
        share = files[trainer.global_rank :: trainer.world_size]
        if files:
            with gathered(pl_module), sampling_precision(trainer, pl_module):
                self._sample_share(pl_module, data, share)
        trainer.strategy.barrier("class images sampled")

    def _sample_share(self, module: Any, data: Any, share: list[Path]) -> None:
        if not share:
            return
        share[0].parent.mkdir(parents=True, exist_ok=True)
        with progress(len(share), f"Sampling images of {data.class_prompt!r} into {data.class_root}") as on_done:
            for start in range(0, len(share), self.batch_size):
                batch = share[start : start + self.batch_size]
                self._sample(module, data, batch)
                on_done(len(batch))

    def _sample(self, module: Any, data: Any, files: list[Path]) -> None:
        height, width = data.size
        prompt = escape_prompt(data.class_prompt)  # training reads captions without prompt weights, too
        samples = module.infer(
            [prompt] * len(files),
            generator=[torch.Generator().manual_seed(int(file.stem.rpartition("-")[2])) for file in files],
            height=height,
            width=width,
            show_progress=False,
        )["samples"]
        for file, image in zip(files, samples, strict=True):
            save_png(image, file, {"prompt": prompt})
