"""The requests of a predict run, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from sdmodule.errors import SettingsError
from sdmodule.requests import TEXT2IMAGE, build_requests


class PromptDataModule(LightningDataModule):
    """Batches of a predict run: lists of `SampleRequest`.

    Args:
        prompt: see `build_requests`, as for the others up to ``task``.
        prompts: path of a file of prompts.
        negative_prompt: what guidance leads away from.
        num_images_per_prompt: images of each prompt.
        seed: seed of the first image.
        image: for inpainting, the picture to repaint, or one for each prompt.
        mask: where to repaint it, or one for each.
        task: what the model is asked to do.
        batch_size: images sampled at once; it does not change them.

    Raises:
        SettingsError: if a setting or the file cannot be used.
    """

    def __init__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompts: str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        image: Any = None,
        mask: Any = None,
        task: str = TEXT2IMAGE,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise SettingsError(f"batch_size={batch_size} is not allowed; give a whole number of at least 1.")
        self.requests = build_requests(
            prompt, prompts, negative_prompt, num_images_per_prompt, seed, image=image, mask=mask, task=task
        )
        self.batch_size = batch_size

    @override
    def predict_dataloader(self) -> DataLoader:
        # by keyword, or Lightning cannot rebuild the loader for prediction
        return DataLoader(self.requests, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]
