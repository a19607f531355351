"""Batches of images that are no files in a folder: in tar shards, or in a data set of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sdmodule.data.datamodule import ImageDataModule
from sdmodule.data.sources.huggingface import HuggingFaceData
from sdmodule.data.sources.mix import Source
from sdmodule.data.sources.tar_shards import Shards


class HuggingFaceDataModule(ImageDataModule):
    """Batches of a data set's images; see `HuggingFaceData`.

    Args:
        name: a hub id, or a folder.
        split: which part of it.
        val_split: another part, for validation.
        subset: which of its configurations.
        revision: branch, tag or commit of a hub id.
        image_column: of images.
        caption_column: of texts.
        template: a text that captions are put into, in the place of ``{}``.
        shuffle_tags: put the parts of captions between commas in another order each time, in training.
        keep_tags: how many of the first parts stay where they are.
        settings: those of `ImageDataModule`.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a data set that cannot be used.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        val_split: str | None = None,
        *,
        subset: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        caption_column: str = "text",
        template: str | None = None,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        **settings: Any,
    ) -> None:
        place = HuggingFaceData(name, split, subset, revision, image_column, caption_column)
        validation = None if val_split is None else Source(replace(place, split=val_split), template=template)
        source = Source(place, template=template, shuffle_tags=shuffle_tags, keep_tags=keep_tags)
        super().__init__([source], validation, **settings)


class ShardsDataModule(ImageDataModule):
    """Batches of images in tar shards; see `Shards`.

    Args:
        shards: a path with ``{000..009}``, ``{a,b}`` or ``*`` in it, or several.
        val_shards: others, for validation.
        caption_key: which value of a ``.json`` is the caption.
        template: a text that captions are put into, in the place of ``{}``.
        shuffle_tags: put the parts of captions between commas in another order each time, in training.
        keep_tags: how many of the first parts stay where they are.
        settings: those of `ImageDataModule`.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for shards that cannot be used.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        val_shards: str | Sequence[str] | None = None,
        *,
        caption_key: str = "caption",
        template: str | None = None,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        **settings: Any,
    ) -> None:
        validation = None
        if val_shards is not None:
            validation = Source(Shards(val_shards, caption_key, "data.val_shards"), template=template)
        place = Shards(shards, caption_key)
        source = Source(place, template=template, shuffle_tags=shuffle_tags, keep_tags=keep_tags)
        super().__init__([source], validation, **settings)
