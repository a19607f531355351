"""DreamBooth: class images, pairs of instance and class images, and prior preservation."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sdmodule.cli.main import train_main
from sdmodule.data.dreambooth import DreamBoothDataModule
from sdmodule.diffusion.noising import prior_preservation_loss
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@pytest.mark.slow
def test_missing_class_images_are_sampled_before_training(checkpoint, tmp_path, train_export):
    settings = ["experiment=dreambooth", "data.class_images=3", f"data.made_in={tmp_path / 'prior'}"]
    settings += [f"cache.folder={tmp_path / 'cache'}"]
    settings += ["data.prompt=a photo of sks cat", "data.class_prompt=a white star"]
    train_export(tmp_path / "out", *settings)
    [folder] = (tmp_path / "prior").iterdir()
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"prior-{k:05}.png" for k in range(3)]
    sd = StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 2})
    seeded = sd.infer("a white star", seed=1, return_type="image")["samples"][0]
    np.testing.assert_allclose(np.asarray(Image.open(files[1]), int), np.asarray(seeded, int), atol=1)
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    train_export(tmp_path / "again", *settings)
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:] and files[0].is_file(), "others are kept"
    train_export(tmp_path / "other", *settings, "sampler.steps=3")
    assert len(list((tmp_path / "prior").iterdir())) == 2, "other sampling settings have their own folder"


def test_a_batch_is_half_instance_and_half_class_images(photos, tmp_path):
    for k in range(4):
        Image.new("RGB", (40, 40), "white").save(tmp_path / f"{k}.png")
    data = DreamBoothDataModule(
        str(photos), "a sks", "a class", class_images=3, class_root=str(tmp_path), resolution=32, batch_size=2
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32) and batch["caption"] == ["a sks"] * 2 + ["a class"] * 2
    assert batch["prior"].tolist() == [False, False, True, True]
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert prior_preservation_loss(losses, batch["prior"], 0.5) == 2 + 0.5 * 15


def test_class_images_have_a_full_mask_if_instance_images_have_masks(photos, tmp_path):
    Image.new("L", (40, 48)).save(photos / "mask.png")
    row = {"file_name": "0.png", "mask_file_name": "mask.png"}
    (photos / "metadata.jsonl").write_text(json.dumps(row))
    Image.new("RGB", (40, 40), "white").save(tmp_path / "class.png")
    class_settings = {"class_prompt": "a class", "class_images": 1, "class_root": str(tmp_path)}
    data = DreamBoothDataModule(str(photos), "a sks", **class_settings, resolution=32, batch_size=1, val_fraction=0)
    with pytest.warns(UserWarning, match=r"left out images that .* does not list: 1\.png, 2\.png, 3\.png and 2 more"):
        data.setup("fit")
    [batch] = data.train_dataloader()
    assert batch["mask"].shape == (2, 1, 32, 32) and batch["mask"].mean(dim=(1, 2, 3)).tolist() == [0, 1]


def test_unreadable_class_images_are_an_error_or_replaced(photos, tmp_path):
    folder = tmp_path / "classes"
    folder.mkdir()
    (folder / "readme.txt").write_text("no image")

    def files(**settings) -> list[str]:
        data = DreamBoothDataModule(
            str(photos), "a sks", "a class", class_images=3, class_root=str(folder), resolution=32, **settings
        )
        data.setup("fit")
        return [file.name for file in data.priors]

    assert files() == ["prior-00000.png", "prior-00001.png", "prior-00002.png"]
    shutil.copy(photos / "1.png", folder)
    for name in ("2.png", "prior-00000.png"):
        (folder / name).write_text("broken")
    with pytest.raises(SettingsError, match=r"data\.class_root=.* unreadable images: 2\.png"):
        files()
    with pytest.warns(UserWarning, match=r"data\.class_root: skipped 2 unreadable images: 2\.png .*prior-00000\.png"):
        assert files(skip_bad=True) == ["1.png", "prior-00001.png", "prior-00002.png"]


def test_unused_class_images_are_reported(photos, tmp_path):
    class_settings = {"class_prompt": "a dog", "class_images": 4, "class_root": str(photos)}
    data = DreamBoothDataModule(str(photos), "a sks dog", **class_settings, resolution=32, batch_size=2, val_fraction=0)
    with pytest.warns(UserWarning, match=r"class_images=4: 2 of the 6 .* not used; set data\.class_images=6 to use"):
        data.setup()
    assert len(data.priors) == 4


def test_missing_class_images_need_their_callback_and_a_text_to_image_model(checkpoint, photos, tmp_path, call):
    command = [f"pretrained={checkpoint}", f"data.root={photos}", "data=dreambooth", "data.prompt=a sks star"]
    command += ["data.class_prompt=a star", f"data.made_in={tmp_path / 'prior'}", f"output_dir={tmp_path / 'out'}"]
    status, _, error = call(train_main, *command)
    assert status == 1 and "add prior to callbacks" in error and len(error.splitlines()) == 1
    inpaint = ["model=inpaint", "training.inpaint.convert=true"]
    status, _, error = call(train_main, *command, *inpaint, "callbacks=[prior]")
    assert status == 1 and "only model=text2image" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "prior").exists()
