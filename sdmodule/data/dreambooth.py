"""Data for DreamBooth (Ruiz et al. 2023): images of one subject beside class images, for prior preservation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, default_collate
from typing_extensions import override

from sdmodule.data.datamodule import ImageDataModule
from sdmodule.data.dataset import ImageFolderDataset
from sdmodule.data.example import CaptionStyle, Example
from sdmodule.data.index.file_examples import FileExamples
from sdmodule.data.sampler import training_loader
from sdmodule.data.sources.folder import Folder, absolute, has_images
from sdmodule.data.sources.mix import ImageSubset, JoinedImages, WeightedSource
from sdmodule.errors import SettingsError, check_int
from sdmodule.io.fingerprint import fingerprint


class InstancePriorPairs(Dataset[list[dict[str, Any]]]):
    """Pairs of an image of the subject and a class image; the smaller of the two sets repeats.

    Args:
        images: a data set, first the subject's images, then the class images.
        instances: number of images of the subject.
    """

    def __init__(self, images: Any, instances: int) -> None:
        self.images = images
        self.instances = instances
        self.priors = len(images) - instances

    def __len__(self) -> int:
        return max(self.instances, self.priors)

    def set_epoch(self, epoch: int) -> None:
        """Draw new crops, flips and captions."""
        if hasattr(self.images, "set_epoch"):
            self.images.set_epoch(epoch)

    @override
    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        instance = self.images[index % self.instances]
        prior = self.images[self.instances + index % self.priors]
        if "mask" in instance and "mask" not in prior:  # the loss counts all of a class image
            prior = {**prior, "mask": torch.ones_like(instance["mask"])}
        return [{**instance, "prior": torch.tensor(False)}, {**prior, "prior": torch.tensor(True)}]


def collate_pairs(pairs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """A batch of twice as many images as pairs: first all images of the subject, then all class images."""
    return default_collate([pair[half] for half in (0, 1) for pair in pairs])


class DreamBoothDataModule(ImageDataModule):
    """Batches for DreamBooth: images of a subject and, with ``class_prompt``, as many class images.

    Class images that are missing are sampled from the model itself before training (`ClassImages`). ``prior`` ``[B]``
    is true for the class images of a batch.

    Args:
        root: folder of images of the subject.
        prompt: their caption, with a rare word for the subject: ``a photo of sks dog``.
        class_prompt: caption of the class: ``a photo of a dog``; None trains without prior preservation.
        class_images: number of class images.
        class_root: folder of class images; None for one under ``made_in``.
        maker: whatever the sampled class images depend on: the model, and how it samples. Another value samples
            others; without it all models share one folder.
        made_in: folder of all sampled class images.
        template: a text in which ``{}`` is replaced by ``prompt``; of several, one is drawn each time.
        shuffle_tags: shuffle the comma-separated parts of ``prompt`` each time.
        keep_tags: how many of the first parts stay in place.
        settings: settings of `ImageDataModule`, without ``conditioning``, and ``buckets`` only without
            ``class_prompt``.

    Raises:
        SettingsError: for a setting out of range; in `setup`, for a folder that cannot be used.
    """

    def __init__(
        self,
        root: str,
        prompt: str,
        class_prompt: str | None = None,
        class_images: int = 200,
        class_root: str | None = None,
        maker: Mapping[str, Any] | None = None,
        made_in: str = "outputs/prior",
        *,
        template: str | Sequence[str] | None = None,
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        **settings: Any,
    ) -> None:
        source = WeightedSource(Folder(root, prompt=prompt), 1.0, template, shuffle_tags, keep_tags)
        super().__init__([source], **settings)
        check_int("data.class_images", class_images)
        if class_prompt is not None and not isinstance(class_prompt, str):
            raise SettingsError(f"data.class_prompt={class_prompt}: must be one caption, in quotes.")
        if self.buckets and class_prompt is not None:
            raise SettingsError(
                "data.buckets=true: cannot be used with data.class_prompt, since the images of a pair share one size; "
                "leave one of them out."
            )
        if self.conditioning is not None:
            raise SettingsError(
                f"data.conditioning={self.conditioning}: is for a ControlNet, and data=dreambooth has no control "
                "images; use data=image_folder, or another tuning."
            )
        if class_root is not None and class_prompt is None:
            raise SettingsError(f"data.class_root={class_root}: needs data.class_prompt, the caption of its images.")
        self.class_prompt = class_prompt
        self.class_images = class_images
        made = Path(made_in).expanduser() / fingerprint(class_prompt, self.size, json.dumps(maker, sort_keys=True))
        self.class_root = made if class_root is None else Path(class_root).expanduser()
        self.priors: list[Path] = []
        self.instances = 0

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        super().setup(stage)
        assert self.train_set is not None
        self.instances = len(self.train_set)
        if self.class_prompt is None:
            return
        self.priors = self._prior_files()
        examples = [Example(file, self.class_prompt) for file in self.priors]
        priors = ImageSubset(FileExamples(examples), range(len(examples)), CaptionStyle())
        both = JoinedImages([self.train_set.examples, priors])  # type: ignore[list-item]
        varied = any(source.varied for source in self.sources)
        self.train_set = ImageFolderDataset(
            both, self.size, self.center_crop, self.random_flip, self.seed, vary_captions=varied
        )

    def _prior_files(self) -> list[Path]:
        """The class images: those that exist, and the names of those that are still to be sampled."""
        folder = absolute(self.class_root)
        good: dict[Path, None] = {}
        if folder.is_file() or has_images(folder):
            source = WeightedSource(Folder(str(folder), "data.class_root", self.class_prompt))
            examples = source.examples(self.skip_bad, self.verify)
            good = dict.fromkeys(Path(str(examples[k].path)) for k in range(len(examples)))
        found = [file for file in good if not file.name.startswith("prior-")]
        own = found[: self.class_images]
        if unused := found[len(own) :]:
            rank_zero_warn(
                f"data.class_images={self.class_images}: {len(unused)} of the {len(found)} images in {folder} are not "
                f"used; set data.class_images={len(found)} to use all."
            )
        names = (folder / f"prior-{k:05}.png" for k in count())
        sampled = (file for file in names if file in good or not file.is_file())
        return [*own, *islice(sampled, self.class_images - len(own))]

    @override
    def train_dataloader(self) -> DataLoader:
        if not self.priors:
            return super().train_dataloader()
        pairs = InstancePriorPairs(self.train_set, self.instances)
        settings = (self.batch_size, self.seed, self.num_workers, self.trainer)
        return training_loader(pairs, *settings, collate=collate_pairs, earlier=self.earlier)
