"""Aspect-ratio buckets: each image goes to the nearest one, and a batch comes from a single one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from sdmodule.data.buckets import bucket_sizes, nearest_bucket
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.families.stable_diffusion_xl import TRAINED_SIZES
from sdmodule.io.image_files import upright_size

SHAPES = [(40, 40), (64, 32), (32, 64), (60, 31), (38, 41), (36, 72)]
"""Width and height of images: two squares, two wide ones, two tall ones."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, shape in enumerate(SHAPES):
        Image.new("RGB", shape, (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": str(k)} for k in range(len(SHAPES))]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("size", [(512, 512), (64, 64), (512, 768), (32, 32)])
def test_buckets_have_at_most_the_requested_area_and_sides_that_fit_the_latents(size):
    sizes = bucket_sizes(size)
    assert size in sizes and {(w, h) for h, w in sizes} - {size[::-1]} <= {*sizes}
    step = 64 if min(size) >= 512 else 8
    assert all(side % step == 0 for bucket in sizes for side in bucket)
    assert all(0.8 * math.prod(size) < math.prod(bucket) <= math.prod(size) for bucket in sizes)
    assert all(max(bucket) <= 2 * min(bucket) for bucket in sizes)


def test_512_has_five_buckets():
    assert bucket_sizes((512, 512)) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    assert nearest_bucket(1920, 1080, bucket_sizes((512, 512))) == (384, 640)
    assert nearest_bucket(3000, 3001, bucket_sizes((512, 512))) == (512, 512)


def test_1024_has_buckets_that_stable_diffusion_xl_was_trained_on():
    assert set(bucket_sizes((1024, 1024))) <= TRAINED_SIZES
    tall = [(1408, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 896), (1088, 960)]
    assert bucket_sizes((1024, 1024)) == [*tall, (1024, 1024), *((w, h) for h, w in reversed(tall))]


def test_the_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == (20, 30)


def test_a_batch_has_one_size_and_every_image_is_shown(folder):
    data = ImageFolderDataModule(str(folder), resolution=32, batch_size=2, val_fraction=0, buckets=True)
    data.setup()
    seen = {}
    for batch in data.train_dataloader():
        seen |= dict.fromkeys(batch["caption"], batch["image"].shape[-2:])
    sizes = {"0": (32, 32), "4": (32, 32)} | dict.fromkeys("13", (24, 40)) | dict.fromkeys("25", (40, 24))
    assert seen == sizes


def test_undersized_buckets_are_reported(folder):
    data = ImageFolderDataModule(str(folder), resolution=32, batch_size=3, val_fraction=0, buckets=True)
    data.setup()
    with pytest.warns(UserWarning, match=r"fewer than the 3 images of a batch: 2 of 24x40, 2 of 32x32, 2 of 40x24"):
        batches = list(data.train_dataloader())
    assert sorted(len(set(batch["caption"])) for batch in batches) == [2, 2, 2]
    assert [len(batch["caption"]) for batch in batches] == [3, 3, 3]
