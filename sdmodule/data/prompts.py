"""The requests of a predict run, in batches."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from sdmodule.conditioning.control import check_control
from sdmodule.errors import check_int
from sdmodule.io.index_set import IndexSet
from sdmodule.io.run_part import Part, PartOfRun, digest
from sdmodule.sampling.requests import TEXT2IMAGE, SampleRequest, build_requests, request_metadata


class RequestBatches(IterableDataset[list[SampleRequest]]):
    """Batches of requests in order; being iterable, they are not split again by Lightning's distributed sampler.

    Args:
        batches: the batches.
        done: indices of images that exist already; they only fill up their batch.
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

    Which images share a batch does not depend on what is done already, so a resumed run computes the same images, to
    the bit, as an uninterrupted one.

    Args:
        prompt: see `build_requests`, as for the others up to ``controlnet``.
        prompts: path of a file of prompts.
        negative_prompt: what guidance steers away from.
        num_images_per_prompt: images per prompt.
        seed: seed of the first image.
        image: the image to inpaint or to start from, one per prompt, or a folder.
        mask: the mask of the image, or one per prompt.
        task: ``text2image``, ``inpaint`` or ``image2image``.
        control: the control image of a ControlNet, or one per prompt.
        control_edges: take the Canny edges of ``control``.
        controlnet: the ControlNet that ``control`` is for, or several.
        batch_size: images sampled at once; it changes an image by rounding at most.
        batch_row: put a single image into this row of a full batch, to reproduce to the bit an image that was sampled
            there.
        ip_adapter_image: for an IP-Adapter, an image for all prompts, or several that count together.
        prompt_2: what the second text encoder reads instead of ``prompt``.
        negative_prompt_2: likewise, instead of ``negative_prompt``.
        shard: sample only a part of the images, such as ``3/100``; see `Part`.

    Attributes:
        requests: those of this run or, of a part, those of the part.
        part: which part of the run that is; None if it is the whole run.
        done: indices of images that exist already; they are not sampled again.

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
        controlnet: str | Sequence[str] | None = None,
        batch_size: int = 1,
        batch_row: int | None = None,
        ip_adapter_image: Any = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        shard: str | None = None,
    ) -> None:
        super().__init__()
        check_int("batch_size", batch_size)
        if batch_row is not None:
            check_int("data.batch_row", batch_row, minimum=0)
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
            controlnets=1 if controlnet is None or isinstance(controlnet, str) else len(controlnet),
            ip_adapter_image=ip_adapter_image,
            prompt_2=prompt_2,
            negative_prompt_2=negative_prompt_2,
        )
        self.batch_size = batch_size
        self.batch_row = batch_row
        self.part: PartOfRun | None = None
        if shard is not None:
            self._take_part(Part.parse(shard), batch_size)
        self.done: IndexSet = IndexSet()

    def _take_part(self, part: Part, batch_size: int) -> None:
        """Leave only the requests of a part."""
        run, self.requests = self.requests, part.of(self.requests, batch_size)
        self.part = PartOfRun(
            part=part.number,
            parts=part.parts,
            first=self.requests[0].index,
            images=len(self.requests),
            total=len(run),
            requests=digest(map(request_metadata, run)),
            settings={"batch_size": batch_size},
        )

    def batches(self, devices: int = 1) -> list[list[SampleRequest]]:
        """The batches that are left to sample; one of which some images are missing is sampled completely."""
        if self.batch_row is not None and len(self.requests) == 1 and self.batch_row < self.batch_size:
            filler = replace(self.requests[0], kept=False)
            batches = [[filler] * self.batch_size]
            batches[0][self.batch_row] = self.requests[0]
        else:
            size = min(self.batch_size, -(-len(self.requests) // devices))  # no device is idle
            batches = [self.requests[k : k + size] for k in range(0, len(self.requests), size)]
        return [batch for batch in batches if any(r.kept and r.index not in self.done for r in batch)]

    @override
    def predict_dataloader(self) -> DataLoader:
        rank, devices = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = RequestBatches(self.batches(devices)[rank::devices], self.done)
        return DataLoader(batches, batch_size=None, collate_fn=list)
