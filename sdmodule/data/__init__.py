"""Data modules and datasets for training, and the prompts to sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdmodule.io.lazy import lazy_attribute

MODULES = {
    "DreamBoothDataModule": "dreambooth",
    "EmojiScenesDataModule": "toy.emoji_dataset",
    "EmojiScenesDataset": "toy.emoji_dataset",
    "HuggingFaceDataModule": "datamodule",
    "ImageDataModule": "datamodule",
    "ImageFolderDataModule": "datamodule",
    "ImageFolderDataset": "dataset",
    "PromptDataModule": "prompts",
    "ShapesDataModule": "toy.dataset",
    "ShapesDataset": "toy.dataset",
    "ShardsDataModule": "datamodule",
    "StreamingDataModule": "streaming.datamodule",
}

__all__ = [*MODULES]

# where ``python -m sdmodule.data.pack`` is
__path__.append(str(Path(__file__).parents[1] / "cli" / "as_module" / "data"))


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, MODULES, name)


def __dir__() -> list[str]:
    return __all__
