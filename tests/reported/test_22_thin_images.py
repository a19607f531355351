"""Row 22: a very thin image costs what its crop costs, not what the whole would at the model's resolution."""

from __future__ import annotations

import resource

import numpy as np
from PIL import Image

from sdmodule.data import dataset
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.data.example import View
from tests.reported.drawing import ramp


def test_a_thin_image_costs_what_its_crop_costs(tmp_path):
    Image.new("RGB", (1, 20000), "red").save(tmp_path / "thin.png")
    (tmp_path / "thin.txt").write_text("thin")
    data = ImageFolderDataModule(str(tmp_path), resolution=256, val_fraction=0)
    data.setup()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert data.train_set[0]["image"].shape == (3, 256, 256)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10, "KiB"


def test_the_part_of_a_large_image_is_the_same_however_it_is_cut(tmp_path, monkeypatch):
    image = ramp(size=(40, 700))
    crop = dataset.Crop(image.size, (64, 48), View(0.3, 0.7, flipped=True))
    whole = np.asarray(crop(image, Image.Resampling.BICUBIC)).astype(int)
    monkeypatch.setattr(dataset, "LARGEST_COVERING", 0)
    part = np.asarray(crop(image, Image.Resampling.BICUBIC)).astype(int)
    assert abs(whole - part).max() <= 1
