"""A folder of captioned images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch import Tensor

import sdmodule
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.data.example import CaptionedImage
from sdmodule.data.sources.folder import find_examples
from sdmodule.data.sources.verify import load_rgb
from sdmodule.errors import SettingsError

EMOJI = Path(sdmodule.__file__).parent / "components" / "assets" / "emoji"


def paint(path: Path, color: str | tuple[int, ...] = "red", size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six grey images, each with a ``.txt``."""
    for k in range(6):
        paint(tmp_path / f"{k}.png", (40 * k,) * 3).with_suffix(".txt").write_text(f"grey {k}\n")
    return tmp_path


def ready(root: Path, **settings: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(str(root), **{"resolution": 8, **settings})
    data.setup()
    return data


def captions(data: ImageFolderDataModule) -> tuple[list[str], list[str]]:
    assert data.train_set is not None and data.val_set is not None
    return [e.caption for e in data.train_set.examples], [e.caption for e in data.val_set.examples]


def test_the_shipped_emoji_make_batches() -> None:
    data = ready(EMOJI, resolution=[32, 48], batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 48)
    assert batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() and batch["image"].max() == 1
    assert all(caption.startswith("an emoji of ") for caption in batch["caption"])
    assert len(find_examples(EMOJI)) == 24


def test_captions_are_read_from_the_txt_beside_each_image(folder: Path) -> None:
    assert [example.caption for example in find_examples(folder)] == [f"grey {k}" for k in range(6)]


def test_metadata_is_preferred_and_reaches_subfolders(folder: Path) -> None:
    paint(folder / "sub" / "x.JPG")
    (folder / "metadata.csv").write_text('file_name,text\nsub/x.JPG,"red, plain"\n')
    with pytest.warns(UserWarning, match=r"left out images that .* does not list: 0\.png, 1\.png, 2\.png and 3 more"):
        assert [e.caption for e in find_examples(folder)] == ["red, plain"]
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/x.JPG", "text": "from jsonl"}\n\n')
    with pytest.warns(UserWarning, match="left out"):
        assert [e.caption for e in find_examples(folder)] == ["from jsonl"]


def test_hidden_files_are_ignored(folder: Path) -> None:
    (folder / "._0.png").write_bytes(b"not an image")
    (folder / ".cache").mkdir()
    paint(folder / ".cache" / "x.png")
    assert len(find_examples(folder)) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n{oops', "line 2 is not JSON"),
        ("metadata.jsonl", '"0.png"', "line 1 is"),
        ("metadata.jsonl", '{"file_name": "0.png", "caption": "a"}', "line 1 has no text, only caption, file_name"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": null}', "text=None; both must be strings"),
        ("metadata.jsonl", '{"file_name": "../0.png", "text": "a"}', "outside the folder"),
        ("metadata.jsonl", '{"file_name": "/etc/0.png", "text": "a"}', "outside the folder"),
        ("metadata.jsonl", "\n", "lists no images"),
        ("metadata.csv", "file_name;text\n0.png;a\n", "line 2 has no file_name, text"),
        ("metadata.csv", "file_name,text\n0.png\n", "line 2 has 1 field, and the header has 2"),
        ("metadata.csv", 'file_name,text\n0.png,"a\n', "is not CSV"),
    ],
)
def test_errors_in_metadata_name_the_line(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(SettingsError, match=message):
        ready(folder)


def test_metadata_that_lists_absent_images_is_an_error(folder: Path) -> None:
    rows = [{"file_name": f"absent{k}.png", "text": ""} for k in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SettingsError, match=r"absent0\.png, absent1\.png, absent2\.png and 2 more"):
        ready(folder)


def test_images_without_a_caption_are_errors(folder: Path) -> None:
    (folder / "3.txt").unlink()
    with pytest.raises(SettingsError, match=r"images without a caption: 3\.png; put a metadata\.jsonl"):
        ready(folder)


def test_unusable_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data\.root=.*nowhere: does not exist"):
        ready(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="contains no images"):
        ready(tmp_path)
    with pytest.raises(SettingsError, match="is a file"):
        ready(paint(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "settings",
    [
        {"resolution": 0},
        {"resolution": [8, 8, 8]},
        {"resolution": 8.5},
        {"batch_size": 0},
        {"num_workers": -1},
        {"val_fraction": 1.0},
    ],
)
def test_settings_out_of_range_are_errors(folder: Path, settings: dict) -> None:
    with pytest.raises(SettingsError, match=f"data.{next(iter(settings))}="):
        ready(folder, **settings)


def spoil_text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def spoil_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(content)


def spoil_floats(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path, format="TIFF")


@pytest.mark.parametrize("spoil", [spoil_text, spoil_checksum, spoil_floats])
def test_unreadable_files_are_errors_or_skipped(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder / "2.png")
    with pytest.raises(SettingsError, match=r"unreadable image: 2\.png .*data\.skip_bad=true"):
        ready(folder)
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable image: 2\.png"):
        data = ready(folder, skip_bad=True)
    train, val = captions(data)
    assert sorted(train + val) == ["grey 0", "grey 1", "grey 3", "grey 4", "grey 5"]


def test_a_source_with_no_readable_image_is_an_error(tmp_path: Path) -> None:
    spoil_text(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SettingsError, match=r"no readable image is left after skipping a\.png"):
        ready(tmp_path, skip_bad=True)


def test_a_decompression_bomb_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(SettingsError, match="decompression bomb"):
        ready(folder)


def test_a_truncated_image_is_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(SettingsError, match=r"a\.jpg cannot be decoded"):
        load_rgb(path)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), "red")
    image.paste("blue", (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = load_rgb(tmp_path / "a.png")
    assert upright.size == (2, 4)
    assert (upright.getpixel((0, 0)), upright.getpixel((0, 3))) == ((0, 0, 255), (255, 0, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "a.png")
    rgb = load_rgb(tmp_path / "a.png")
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == ((255, 255, 255), (0, 0, 0))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16)).save(tmp_path / f"a.{suffix}")
    assert np.asarray(load_rgb(tmp_path / f"a.{suffix}"))[0, :, 0].tolist() == [0, 128, 255]


def test_a_gif_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert load_rgb(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("size", "resolution"), [((30, 10), 16), ((10, 30), 16), ((7, 7), [16, 24])])
def test_the_centre_is_cropped(tmp_path: Path, size: tuple[int, int], resolution: int | list[int]) -> None:
    image = Image.new("RGB", size, "red")
    image.paste("lime", (size[0] // 3, size[1] // 3, size[0] - size[0] // 3, size[1] - size[1] // 3))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    data = ready(tmp_path, resolution=resolution, val_fraction=0)
    assert data.train_set is not None
    pixels = data.train_set[0]["image"]
    height, width = (16, 16) if resolution == 16 else (16, 24)
    assert pixels.shape == (3, height, width)
    torch.testing.assert_close(pixels, pixels.flip(-1), atol=0.1, rtol=0)
    assert pixels[1, height // 2, width // 2] > 0.9


def test_validation_is_chosen_by_name(folder: Path) -> None:
    train, val = captions(ready(folder))
    assert len(val) == 1 and len(train) == 5 and not set(train) & set(val)
    assert captions(ready(folder, seed=9)) == (train, val)
    assert len(captions(ready(folder, val_fraction=0.5))[1]) == 3
    assert captions(ready(folder, val_fraction=0))[1] == []


def test_validation_from_another_folder(folder: Path) -> None:
    train, val = captions(ready(folder, val_root=str(EMOJI)))
    assert (len(train), len(val)) == (6, 24)
    with pytest.raises(SettingsError, match=r"data\.val_root=nowhere"):
        ready(folder, val_root="nowhere")


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    paint(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    with pytest.raises(SettingsError, match=r"data\.val_fraction=0"):
        ready(tmp_path)


def test_a_small_folder_gives_one_batch(folder: Path) -> None:
    assert [len(b["caption"]) for b in ready(folder, batch_size=9).train_dataloader()] == [5]
    assert [len(b["caption"]) for b in ready(folder, batch_size=3).train_dataloader()] == [3]


class Recorder(LightningModule):
    """Records the training images of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[Tensor]] = {}

    def training_step(self, batch: CaptionedImage) -> Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch["image"])
        return self.weight

    def validation_step(self, batch: CaptionedImage) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_crops_change_by_epoch_and_survive_a_resume(tmp_path: Path, num_workers: int) -> None:
    def fit(max_epochs: int, ckpt_path: Path | None = None) -> dict[int, Tensor]:
        data = ImageFolderDataModule(
            str(EMOJI), resolution=[8, 24], val_fraction=0, center_crop=False, random_flip=True, num_workers=num_workers
        )
        model = Recorder()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=max_epochs,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return {epoch: torch.cat(batches) for epoch, batches in model.epochs.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fit(3)
        fit(1)
        resumed = fit(3, tmp_path / "1.ckpt")
    assert [len(images) for images in whole.values()] == [24, 24, 24]
    assert not torch.equal(whole[0].sort(0).values, whole[1].sort(0).values)
    assert resumed.keys() == {1, 2}
    assert torch.equal(resumed[1], whole[1]) and torch.equal(resumed[2], whole[2])


def test_loading_does_not_advance_the_global_rng(folder: Path) -> None:
    data = ready(folder, center_crop=False, random_flip=True)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_are_cropped_and_flipped_with_their_images(tmp_path: Path) -> None:
    """The image is white exactly where its mask is."""
    drawn = np.zeros((24, 40), dtype=np.uint8)
    drawn[4:16, 22:34] = 255
    for name in ("a.png", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(drawn).save(tmp_path / name)
    row = {"file_name": "a.png", "text": "a box", "mask_file_name": "masks/a.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    data = ready(tmp_path, resolution=24, center_crop=False, random_flip=True, val_fraction=0)
    places = set()
    for epoch in range(12):
        data.train_set.set_epoch(epoch)
        example = data.train_set[0]
        assert example["mask"].shape == (1, 24, 24)
        assert torch.equal(example["mask"], (example["image"][:1] > 0).float())
        places.add(int(example["mask"].argmax()))
    assert len(places) > 2


def test_with_one_prompt_masks_are_not_taken_for_images(tmp_path: Path) -> None:
    for name in ("a.png", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (24, 24)).save(tmp_path / name)
    row = {"file_name": "a.png", "mask_file_name": "masks/a.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    data = ready(tmp_path, resolution=24, val_fraction=0, prompt="a box")
    assert len(data.train_set) == 1 and data.train_set[0].keys() >= {"image", "mask"}
    assert data.train_set[0]["caption"] == "a box"


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({}, "column mask_file_name, but no value for b.png"),
        ({"mask_file_name": "../b.png"}, "outside the folder"),
        ({"mask_file_name": "c.png"}, "do not exist: c.png"),
        ({"mask_file_name": 3}, "mask_file_name=3; it must be a string"),
        ({"mask_file_name": "small.png"}, "has 4x4 pixels, but .* has 12x8"),
    ],
)
def test_masks_that_do_not_fit_are_errors(tmp_path: Path, second: dict, says: str) -> None:
    for name in ("a.png", "b.png", "mask.png"):
        paint(tmp_path / name)
    paint(tmp_path / "small.png", size=(4, 4))
    rows = [
        {"file_name": "a.png", "text": "a", "mask_file_name": "mask.png"},
        {"file_name": "b.png", "text": "b"} | second,
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SettingsError, match=says):
        ready(tmp_path, val_fraction=0).train_set[1]
