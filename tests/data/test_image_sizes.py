"""The true size and crop of each training image, which Stable Diffusion XL is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sdmodule.data.cache.latents import CachedMomentsDataset
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.io.images import image_to_tensor


@pytest.fixture
def folder(tmp_path):
    """Images of several shapes, one of them on its side as its EXIF data says."""
    generator = np.random.default_rng(0)
    for k, (width, height) in enumerate([(90, 50), (40, 75), (33, 32), (200, 40)]):
        image = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6 if k == 1 else 1
        image.save(tmp_path / f"{k}.png", exif=exif)
        (tmp_path / f"{k}.txt").write_text(f"image {k}")
    return tmp_path


def data_of(folder, **settings):
    data = ImageFolderDataModule(str(folder), 32, batch_size=2, val_fraction=0, **settings)
    data.setup()
    return data.train_set


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("center_crop", [False, True])
def test_sizes_say_where_the_image_lies_in_the_resized_one(folder, buckets, center_crop):
    images = data_of(folder, center_crop=center_crop, random_flip=True, buckets=buckets)
    flips, corners = set(), set()
    for epoch in range(4):
        images.set_epoch(epoch)
        for index in range(len(images)):
            example, view = images[index], images.view(index)
            original = ImageOps.exif_transpose(Image.open(folder / f"{index}.png"))
            assert example["original_size"].tolist() == [original.height, original.width]
            height, width = example["image"].shape[1:]
            scale = max(width / original.width, height / original.height)
            resized = original.resize(
                (max(width, round(original.width * scale)), max(height, round(original.height * scale))),
                Image.Resampling.BICUBIC,
            )
            if view.flipped:
                resized = ImageOps.mirror(resized)
            top, left = example["crop_top_left"].tolist()
            part = image_to_tensor(resized.crop((left, top, left + width, top + height)))
            assert torch.equal(part, example["image"])
            flips.add(view.flipped)
            corners.add((index, top, left))
    assert flips == {False, True}
    assert len(corners) > len(images)


def test_cached_moments_come_with_the_same_sizes(folder):
    images = data_of(folder, random_flip=True)
    keys = np.arange(4 * 2 * 16, dtype=np.uint8).reshape(4, 2, 16)
    store = {key.tobytes().hex(): torch.zeros(8, 8, 8) for key in keys.reshape(8, 16)}
    cached = CachedMomentsDataset(images, store, keys, np.array([images.original_size(k) for k in range(4)]))
    for epoch in range(3):
        cached.set_epoch(epoch)
        for index in range(len(images)):
            for name in ("original_size", "crop_top_left"):
                assert torch.equal(cached[index][name], images[index][name])
