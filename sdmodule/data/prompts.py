"""The requests of a predict run, in batches."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from sdmodule.conditioning.control import check_control
from sdmodule.ranges import check_whole
from sdmodule.sampling.requests import TEXT2IMAGE, SampleRequest, build_requests


class Batches(IterableDataset[list[SampleRequest]]):
    """Batches in their order; Lightning, which would cut a list anew for every device, takes them as they are.

    Args:
        batches: of requests.
        done: indices of the images that are there already, and are made for company alone.
    """

    def __init__(self, batches: Sequence[list[SampleRequest]], done: Container[int]) -> None:
        self.batches = batches
        self.done = done

    @override
    def __iter__(self) -> Iterator[list[SampleRequest]]:
        for batch in self.batches:
            yield [replace(request, kept=request.kept and request.index not in self.done) for request in batch]


class PromptDataModule(LightningDataModule):
    """Batches of a predict run: lists of `SampleRequest`.

    Images that share a batch do so whatever has been done already, so that a run which is resumed rounds its sums as
    one that was never stopped.

    Args:
        prompt: see `build_requests`, as for the others up to ``task``.
        prompts: path of a file of prompts.
        negative_prompt: what guidance leads away from.
        num_images_per_prompt: images of each prompt.
        seed: seed of the first image.
        image: for inpainting, the image to repaint, or one for each prompt.
        mask: where to repaint it, or one for each.
        task: what the model is asked to do.
        control: the image that a ControlNet follows, or one for each prompt.
        control_edges: the edges of ``control`` are followed.
        controlnet: the ControlNet, without which nothing follows ``control``.
        batch_size: images sampled at once; it does not change them, but for their last bit.
        batch_row: sample a single image at this place of a full batch, as it was sampled before; to the last bit.

    Attributes:
        done: records of images that are there already, by index; they are not sampled.

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
        control: Any = None,
        control_edges: bool = False,
        controlnet: str | None = None,
        batch_size: int = 1,
        batch_row: int | None = None,
    ) -> None:
        super().__init__()
        check_whole("batch_size", batch_size)
        check_control(control is not None, controlnet is not None)
        self.requests = build_requests(
            prompt,
            prompts,
            negative_prompt,
            num_images_per_prompt,
            seed,
            image=image,
            mask=mask,
            task=task,
            control=control,
            control_edges=control_edges,
        )
        self.batch_size = batch_size
        self.batch_row = batch_row
        self.done: Mapping[int, dict[str, Any]] = {}

    def batches(self, devices: int = 1) -> list[list[SampleRequest]]:
        """What is left to sample; every batch of which something is left is sampled whole."""
        if self.batch_row is not None and len(self.requests) == 1 and self.batch_row < self.batch_size:
            company = replace(self.requests[0], kept=False)
            whole = [[company] * self.batch_size]
            whole[0][self.batch_row] = self.requests[0]
        else:
            size = min(self.batch_size, -(-len(self.requests) // devices))  # every device has something to do
            whole = [self.requests[k : k + size] for k in range(0, len(self.requests), size)]
        return [batch for batch in whole if any(r.kept and r.index not in self.done for r in batch)]

    @override
    def predict_dataloader(self) -> DataLoader:
        rank, devices = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DataLoader(Batches(self.batches(devices)[rank::devices], self.done), batch_size=None, collate_fn=list)
