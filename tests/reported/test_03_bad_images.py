"""Row 3: an image that cannot be decoded is found before the first step, whatever its format and wherever it is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from sdmodule.data.datamodule import HuggingFaceDataModule, ImageFolderDataModule, ShardsDataModule
from sdmodule.data.sources import verify
from sdmodule.errors import SettingsError
from tests.reported.drawing import captioned, metadata, noise, numbered, ramp, strokes

CUT = {
    "plain.jpg": {},
    "progressive.jpg": {"progressive": True},
    "half.png": {},
    "half.gif": {},
    "half.bmp": {},
    "half.tiff": {},
    "half.webp": {},
    "half.avif": {},
    "half.jp2": {},
    "half.tga": {},
    "half.ppm": {},
}


def halved(name: str, folder: Path) -> bytes:
    noise().save(folder / name, **CUT[name])
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    return content[: len(content) // 2]


@pytest.fixture
def folder(tmp_path):
    """Four good images and one of each format that is cut in half."""
    numbered(tmp_path / "photos", 4)
    for name in CUT:
        (tmp_path / "photos" / name).write_bytes(halved(name, tmp_path))
        (tmp_path / "photos" / name).with_suffix(".txt").write_text(name)
    (tmp_path / "photos" / "half.txt").write_text("half")
    return tmp_path / "photos"


def ready(data):
    data.setup()
    return data


SETTINGS = {"resolution": 8, "batch_size": 1, "val_fraction": 0}


@pytest.mark.parametrize("settings", [{}, {"buckets": True}])
def test_cut_files_of_a_folder_are_left_out_with_one_warning_that_says_why(folder, settings):
    with pytest.warns(UserWarning, match=rf"skipped {len(CUT)} unreadable images: ") as told:
        data = ready(ImageFolderDataModule(str(folder), skip_bad=True, **SETTINGS, **settings))
    [text] = [str(one.message) for one in told if "unreadable" in str(one.message)]
    assert all(f"{name} (" in text for name in CUT)
    assert sorted(caption for batch in data.train_dataloader() for caption in batch["caption"]) == [
        f"p{k}" for k in range(4)
    ]


def test_without_skip_bad_they_are_refused_before_the_first_step(folder):
    with pytest.raises(SettingsError, match=rf"{len(CUT)} unreadable images: half\.avif \(.*data\.skip_bad=true"):
        ready(ImageFolderDataModule(str(folder), **SETTINGS))


@pytest.mark.parametrize("name", ["plain.jpg", "half.gif", "half.bmp", "half.tiff"])
def test_cut_members_of_a_shard_and_rows_of_a_data_set_are_left_out(tmp_path, name):
    import tarfile

    import datasets

    good = io.BytesIO()
    ramp().save(good, "PNG")
    contents = {f"a{Path(name).suffix}": halved(name, tmp_path), "b.png": good.getvalue()}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for member, content in {**contents, "a.txt": b"cut", "b.txt": b"good"}.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    rows = {"image": [{"bytes": content, "path": None} for content in contents.values()], "text": ["cut", "good"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "rows")
    for data in (
        ShardsDataModule(str(tmp_path / "0.tar"), skip_bad=True, **SETTINGS),
        HuggingFaceDataModule(str(tmp_path / "rows"), skip_bad=True, **SETTINGS),
    ):
        with pytest.warns(UserWarning, match="skipped 1 unreadable image"):
            ready(data)
        assert [batch["caption"] for batch in data.train_dataloader()] == [["good"]]


def test_a_cut_mask_leaves_its_image_out(tmp_path):
    for file in numbered(tmp_path, 3).glob("*.txt"):
        file.unlink()
    strokes((0, 0, 0), (255, 255, 255)).save(tmp_path / "mask.bmp")
    content = (tmp_path / "mask.bmp").read_bytes()
    (tmp_path / "cut.bmp").write_bytes(content[: len(content) // 2])
    masks = ["mask.bmp", "cut.bmp", "mask.bmp"]
    metadata(tmp_path, [{"file_name": f"p{k}.png", "text": f"p{k}", "mask_file_name": masks[k]} for k in range(3)])
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable image: cut\.bmp \("):
        data = ready(ImageFolderDataModule(str(tmp_path), skip_bad=True, **SETTINGS))
    assert len(data.train_set) == 2


def test_a_file_is_decoded_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    numbered(tmp_path / "photos", 3)
    opened: list[Path] = []
    original = verify.open_image
    monkeypatch.setattr(verify, "open_image", lambda file: opened.append(file) or original(file))
    for expected in (["p0.png", "p1.png", "p2.png"], []):
        opened.clear()
        ready(ImageFolderDataModule(str(tmp_path / "photos"), **SETTINGS))
        assert sorted(file.name for file in opened) == expected
    captioned(tmp_path / "photos" / "p1.png", noise(), "p1")
    opened.clear()
    ready(ImageFolderDataModule(str(tmp_path / "photos"), **SETTINGS))
    assert [file.name for file in opened] == ["p1.png"]


def test_a_bad_file_is_checked_and_told_of_each_time(folder):
    for _ in range(2):
        with pytest.warns(UserWarning, match="unreadable images"):
            ready(ImageFolderDataModule(str(folder), skip_bad=True, **SETTINGS))


def test_without_a_cache_folder_files_are_checked_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    assert len(ready(ImageFolderDataModule(str(numbered(tmp_path / "photos", 2)), **SETTINGS)).train_set) == 2


def test_pixels_without_a_range_are_refused_each_time(tmp_path):
    numbered(tmp_path / "photos", 2)
    captioned(tmp_path / "photos" / "float.tiff", Image.new("F", (8, 8), 3.5), "float")
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"float\.tiff \(floating-point pixels have no fixed range\)"):
            ready(ImageFolderDataModule(str(tmp_path / "photos"), **SETTINGS))
