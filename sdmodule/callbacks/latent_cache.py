"""Encode the training pictures once, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Required, TypedDict, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from sdmodule.data.shapes import CaptionedImage
from sdmodule.errors import SettingsError
from sdmodule.requests import INPAINT


class CaptionedMoments(TypedDict, total=False):
    """One training example: ``moments`` is mean and standard deviation of the latents, ``[8, h, w]``.

    For inpainting the picture stands beside them, since each step masks and encodes it in another way.
    """

    moments: Required[Tensor]
    caption: Required[str]
    image: Tensor
    mask: Tensor


class CachedLatents(Dataset[CaptionedMoments]):
    """A data set whose pictures are encoded; the moments stay on disk and are read as they are needed.

    Args:
        file: a NumPy array ``[N, 8, h, w]`` of float16.
        captions: the N captions.
        pictures: the N pictures, where the training needs them too.
    """

    def __init__(self, file: Path, captions: list[str], pictures: Dataset[Any] | None = None) -> None:
        self.moments = np.load(file, mmap_mode="r")
        self.captions = captions
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.captions)

    @override
    def __getitem__(self, index: int) -> CaptionedMoments:
        example = self.pictures[index] if self.pictures is not None else {}
        moments = torch.from_numpy(np.array(self.moments[index]))
        return cast(CaptionedMoments, {**example, "moments": moments, "caption": self.captions[index]})


class LatentCache(Callback):
    """Replace the training pictures by the moments of their latents; noise is drawn from them anew each time.

    The data must show each picture in one way only: no random crop, no random flip.

    Args:
        folder: where the moments are written.
        batch_size: pictures encoded at once.
    """

    def __init__(self, folder: str | Path, batch_size: int = 64) -> None:
        self.file = Path(folder) / "moments.npy"
        self.batch_size = batch_size

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "random_flip", False) or not getattr(data, "center_crop", True):
            raise SettingsError(
                "cache=latents needs pictures that look the same each time; "
                "set data.random_flip=false and data.center_crop=true, or cache=none."
            )
        data.train_set = self._encode(data.train_set, pl_module)

    def _encode(self, pictures: Dataset[CaptionedImage], module: LightningModule) -> CachedLatents:
        count = len(pictures)  # type: ignore[arg-type]
        rank_zero_info(f"Encoding {count} pictures into {self.file} …")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        captions: list[str] = []
        moments = None
        for batch in DataLoader(pictures, self.batch_size):
            with torch.autocast(module.device.type, torch.bfloat16, enabled=module.trainer.precision == "bf16-mixed"):
                encoded = module.encode_moments(batch["image"].to(module.device)).cpu()  # type: ignore[operator]
            if moments is None:
                shape = (count, *encoded.shape[1:])
                moments = np.lib.format.open_memmap(self.file, mode="w+", dtype=np.float16, shape=shape)
            moments[len(captions) : len(captions) + len(encoded)] = encoded.numpy()
            captions += batch["caption"]
        return CachedLatents(self.file, captions, pictures if module.task == INPAINT else None)
