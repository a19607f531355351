"""Data modules and datasets for training, and the prompts to sample."""

from __future__ import annotations

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
}

__all__ = [*MODULES]


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, MODULES, name)


def __dir__() -> list[str]:
    return __all__
