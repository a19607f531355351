"""Images of one thing, and beside them images of its kind, which keep the model from forgetting the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate
from typing_extensions import override

from sdmodule.data.datamodule import ImageDataModule
from sdmodule.data.dataset import ImageFolderDataset
from sdmodule.data.sampler import training_loader
from sdmodule.data.sources.folder import CaptionStyle, Example, absolute, image_files
from sdmodule.data.sources.mix import Folder, ImageSubset, Source
from sdmodule.errors import SettingsError
from sdmodule.io.fingerprint import fingerprint
from sdmodule.ranges import check_whole


class Pairs(Dataset[list[dict[str, Any]]]):
    """An image of the thing and one of its kind; each is shown as often as the larger set needs.

    Args:
        images: those of the thing first.
        instances: how many of the thing there are.
    """

    def __init__(self, images: Any, instances: int) -> None:
        self.images = images
        self.instances = instances
        self.priors = len(images) - instances

    def __len__(self) -> int:
        return max(self.instances, self.priors)

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops and flips from now on."""
        if hasattr(self.images, "set_epoch"):
            self.images.set_epoch(epoch)

    @override
    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        instance = self.images[index % self.instances]
        prior = self.images[self.instances + index % self.priors]
        if "mask" in instance and "mask" not in prior:  # all of it counts
            prior = {**prior, "mask": torch.ones_like(instance["mask"])}
        return [{**instance, "prior": torch.tensor(False)}, {**prior, "prior": torch.tensor(True)}]


def both_halves(pairs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """A batch of twice as many images as pairs: the thing's in the first half, those of its kind in the second."""
    return default_collate([pair[half] for half in (0, 1) for pair in pairs])


class DreamBoothDataModule(ImageDataModule):
    """Batches for DreamBooth (Ruiz et al. 2023): images of a thing and, with ``class_prompt``, as many of its kind.

    Those of its kind are made by the model itself before the training (`PriorImages`) as far as they are missing.
    ``prior`` ``[B]`` says which images of a batch they are.

    Args:
        root: folder of images of the thing.
        prompt: their caption, with a rare word as the thing's name: ``a photo of sks dog``.
        class_prompt: caption of its kind: ``a photo of a dog``; None trains on the thing alone.
        class_images: how many of its kind.
        class_root: where they are, or are put; None is a folder of their own under ``made_in``.
        maker: what says which images are made: the model, and how it samples; another one makes others. Where nothing
            is said, all models share one folder.
        made_in: folder for all that were made.
        template: a text that ``prompt`` is put into, in the place of ``{}``; of several one is drawn each time.
        shuffle_tags: put the parts of ``prompt`` between commas in another order each time.
        keep_tags: how many of the first parts stay where they are.
        settings: those of `ImageDataModule`, without ``buckets`` and ``conditioning``.

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
        source = Source(Folder(root, prompt=prompt), 1.0, template, shuffle_tags, keep_tags)
        super().__init__([source], **settings)
        check_whole("data.class_images", class_images)
        if class_prompt is not None and not isinstance(class_prompt, str):
            raise SettingsError(f"data.class_prompt={class_prompt} is no text; give one caption, in quotes.")
        if self.buckets and class_prompt is not None:
            raise SettingsError("data.buckets=true parts images by shape, and pairs are of one; leave it out.")
        if self.conditioning is not None:
            raise SettingsError(
                f"data.conditioning={self.conditioning} is for a ControlNet, and data=dreambooth has no control "
                "images; use data=image_folder, or another tuning."
            )
        if class_root is not None and class_prompt is None:
            raise SettingsError(f"data.class_root={class_root} needs data.class_prompt, the caption of its images.")
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
        priors = ImageSubset(examples, range(len(examples)), CaptionStyle())
        both = ConcatDataset([self.train_set.examples, priors])  # type: ignore[list-item]
        varied = any(source.varied for source in self.sources)
        self.train_set = ImageFolderDataset(
            both, self.size, self.center_crop, self.random_flip, self.seed, vary_captions=varied
        )

    def _prior_files(self) -> list[Path]:
        """The images of the kind: those that are there, and names of those that are to be made."""
        folder = absolute(self.class_root)
        good: dict[Path, None] = {}
        if folder.is_file() or image_files(folder):
            examples = Source(Folder(str(folder), "data.class_root", self.class_prompt)).examples(self.skip_bad)
            good = dict.fromkeys(Path(str(examples[k].path)) for k in range(len(examples)))
        found = [file for file in good if not file.name.startswith("prior-")]
        own = found[: self.class_images]
        if unused := found[len(own) :]:
            rank_zero_warn(
                f"data.class_images={self.class_images}: {len(unused)} of the {len(found)} images in {folder} are "
                f"not used; data.class_images={len(found)} takes all."
            )
        names = (folder / f"prior-{k:05}.png" for k in count())
        made = (file for file in names if file in good or not file.is_file())
        return [*own, *islice(made, self.class_images - len(own))]

    @override
    def train_dataloader(self) -> DataLoader:
        if not self.priors:
            return super().train_dataloader()
        pairs = Pairs(self.train_set, self.instances)
        loader = (self.batch_size, self.seed, self.num_workers, self.trainer)
        return training_loader(pairs, *loader, collate=both_halves)
