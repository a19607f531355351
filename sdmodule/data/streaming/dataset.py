"""Training examples of a streamed set: images with captions, or their moments and text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from typing_extensions import override

from sdmodule.conditioning.prompt_syntax import escape_prompt
from sdmodule.data.buckets import Size
from sdmodule.data.cache.latents import CachedEmbeddings, CaptionedMoments
from sdmodule.data.dataset import CANNY, FILES, Crop, ImageFolderDataset
from sdmodule.data.example import CaptionedImage, CaptionStyle, Example
from sdmodule.data.streaming.index import Samples
from sdmodule.data.streaming.set import ShardReader
from sdmodule.data.streaming.tar_samples import StreamedFile, read_caption
from sdmodule.errors import SettingsError
from sdmodule.io.image_files import upright_size

MOMENTS, FLIPPED, HIDDEN_STATES, POOLED = "moments", "moments_flipped", "hidden_states", "pooled"
"""Names of the tensors of an encoded sample."""

EMPTY_PROMPT = "empty_prompt.safetensors"
"""File of a set with the text embeddings of the empty prompt."""

HELD = "text_embeddings"
"""Where a batch has the text embeddings of its captions."""


class StreamedExamples:
    """Images and captions of a set, read when they are needed.

    Args:
        reader: reads them.
        samples: which.
        style: how their captions are rewritten; None for the styles that they were packed with.
        masks: with their masks.
    """

    def __init__(self, reader: ShardReader, samples: Samples, style: CaptionStyle | None, masks: bool) -> None:
        self.reader = reader
        self.samples = samples
        self.style = style
        self.masks = masks

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self.samples):
            raise IndexError(index)
        shard, files = self.reader.sample(*self.samples.locate(index))
        text, about = read_caption(shard, files, self.reader.source.caption_key)
        style = self.style
        if style is None:
            templates, shuffle_tags, keep_tags = about.get("style", ((), False, 0))
            style = CaptionStyle(tuple(templates), bool(shuffle_tags), int(keep_tags))
        mask = StreamedFile(shard, files.mask) if files.mask and self.masks else None
        control = StreamedFile(shard, files.control) if files.control else None
        return Example(StreamedFile(shard, files.image), text, mask, style, control)

    def original_size(self, index: int) -> Size:
        """Height and width of an image, from what was packed with it, or from its file."""
        shard, files = self.reader.sample(*self.samples.locate(index))
        _, about = read_caption(shard, files, self.reader.source.caption_key)
        if isinstance(about.get("size"), list):
            height, width = about["size"]
            return int(height), int(width)
        width, height = upright_size(StreamedFile(shard, files.image))
        return height, width

    def encoded(self, index: int) -> dict[str, Tensor]:
        """The encoded tensors of a sample.

        Raises:
            SettingsError: if they cannot be read.
        """
        shard, files = self.reader.sample(*self.samples.locate(index))
        try:
            if files.encoded is None:
                raise OSError("there are none")
            return load(shard.read(files.encoded))
        except (SafetensorError, OSError) as error:
            raise SettingsError(
                f"{shard.key}: the latents of {files.image[0]} in {shard.name} cannot be read ({error}); pack the set "
                "again."
            ) from error


class StreamedImages(ImageFolderDataset):
    """Images of a streamed set, resized to cover their size and cropped to it; see `ImageFolderDataset`.

    Args:
        examples: the images.
        size: height and width in pixels, where there are no buckets.
        skip_bad: show another image of its shard instead of one that cannot be read.
        settings: further settings of `ImageFolderDataset`.
    """

    def __init__(self, examples: StreamedExamples, size: Size, skip_bad: bool = False, **settings: Any) -> None:
        super().__init__(examples, size, **settings)
        self.streamed = examples
        self.skip_bad = skip_bad
        self._told: set[int] = set()

    @override
    def size_of(self, index: int) -> Size:
        samples, buckets = self.streamed.samples, self.streamed.reader.index.buckets
        if not samples.bucketed or buckets is None:
            return self.size
        height, width = buckets[samples.locate(index)[0]]
        return int(height), int(width)

    @override
    def original_size(self, index: int) -> Size:
        return self.streamed.original_size(index)

    @override
    def __getitem__(self, index: int) -> CaptionedImage:
        try:
            return super().__getitem__(index)
        except SettingsError as error:
            if not self.skip_bad:
                raise
            return self._instead(index, error)

    def _instead(self, index: int, error: SettingsError) -> CaptionedImage:
        """The next readable image of the shard."""
        for other in self.streamed.samples.neighbours(index):
            try:
                example = super().__getitem__(other)
            except SettingsError:
                continue
            if index not in self._told:
                self._told.add(index)
                rank_zero_warn(f"data.skip_bad=true: shows another image of its shard instead: {error}")
            return example
        raise error


class StreamedMoments(Dataset[CaptionedMoments]):
    """Moments of a set that was packed with them, and text embeddings if they are wanted.

    Args:
        images: the images of the set, which choose the view of each epoch.
        with_images: return the image beside its moments.
        with_text: return the embeddings of the caption too.
    """

    def __init__(self, images: StreamedImages, with_images: bool, with_text: bool) -> None:
        self.images = images
        self.with_images = with_images
        self.with_text = with_text

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Draw new flips."""
        self.images.set_epoch(epoch)

    @override
    def __getitem__(self, index: int) -> CaptionedMoments:
        images, view = self.images, self.images.view(index)
        example: dict[str, Any] = images.load(index, view) if self.with_images else {}
        height, width = images.original_size(index)
        encoded, caption = images.streamed.encoded(index), images.caption(index)
        example |= Crop((width, height), images.size_of(index), view).sizes()
        example |= {MOMENTS: encoded[FLIPPED if view.flipped else MOMENTS].float(), "caption": caption}
        if self.with_text:
            example[HELD] = (escape_prompt(caption), encoded[HIDDEN_STATES], encoded.get(POOLED))
        return cast(CaptionedMoments, example)


class HeldEmbeddings:
    """Text embeddings of a batch; they stay in CPU memory, from where a step takes those it needs.

    Args:
        rows: of each caption the prompt, its hidden states ``[L, D]``, and its pooled embedding ``[P]`` or None.
    """

    def __init__(self, rows: Sequence[tuple[str, Tensor, Tensor | None]]) -> None:
        self.rows = rows

    def entries(self) -> dict[str, Tensor]:
        """What `CachedEmbeddings` looks up."""
        return {key: value for row in self.rows for key, value in CachedEmbeddings.entries(*row).items()}


def collate_encoded(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of encoded samples; text embeddings may be of several lengths, and stay rows."""
    held = [example.pop(HELD) for example in examples if HELD in example]
    batch = default_collate(list(examples))
    return {**batch, HELD: HeldEmbeddings(held)} if held else batch


class BatchEmbeddings(CachedEmbeddings):
    """Text embeddings of the captions of one batch at a time, and of the empty prompt.

    Args:
        empty: those of the empty prompt, by `CachedEmbeddings.entries`.
    """

    def __init__(self, empty: dict[str, Tensor]) -> None:
        self.empty = empty
        self.held: dict[str, Tensor] = dict(empty)
        super().__init__(cast(Any, self.held))

    def hold(self, batch: Any) -> None:
        """Take the embeddings of a batch instead of those of the one before."""
        found = batch.pop(HELD, None) if isinstance(batch, dict) else None
        self.held.clear()
        self.held.update(self.empty)
        if isinstance(found, HeldEmbeddings):
            self.held.update(found.entries())


def check_conditioning(conditioning: str | None, controls: bool, source: object) -> None:
    """Check that a set has the control images that are asked for.

    Raises:
        SettingsError: if it has not.
    """
    if conditioning == FILES and not controls:
        raise SettingsError(
            f"data.conditioning={FILES}: {source} has no control images; pack it from data that name them, or set "
            f"data.conditioning={CANNY}."
        )


def empty_prompt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings of the empty prompt as `BatchEmbeddings` takes them."""
    pooled = tensors.get(POOLED)
    return CachedEmbeddings.entries("", tensors[HIDDEN_STATES], None if pooled is None else torch.as_tensor(pooled))
