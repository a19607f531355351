"""Row 20: images and captions are found whatever their suffix and folder, and what is left out is named."""

from __future__ import annotations

import warnings

import pytest

from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.data.sources.folder import find_examples
from sdmodule.errors import SettingsError
from sdmodule.io.image_files import FORMAT_SUFFIXES, SUFFIXES
from tests.reported.drawing import captioned, numbered, ramp


def names(folder) -> list[str]:
    return [str(example.path.relative_to(folder)) for example in find_examples(folder)]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_kind_that_is_named_is_read(tmp_path, suffix):
    [kind] = [kind for kind, suffixes in FORMAT_SUFFIXES.items() if suffix in suffixes]
    image = ramp().convert("L") if suffix in (".pgm", ".pbm") else ramp()
    captioned(tmp_path / f"a{suffix.upper()}", image, "a", format=kind)
    data = ImageFolderDataModule(str(tmp_path), resolution=8, val_fraction=0)
    data.setup()
    assert data.train_set[0]["image"].shape == (3, 8, 8)


def test_kinds_that_are_not_read_are_named_and_counted(tmp_path):
    numbered(tmp_path, 2)
    for name in ("a.heic", "b.jxl", "c.CR2", "d.svg"):
        (tmp_path / name).write_bytes(b"no matter what")
    told = r"left out 4 images of kinds that are not read: a\.heic, b\.jxl, c\.CR2 and 1 more"
    with pytest.warns(UserWarning, match=told):
        assert names(tmp_path) == ["p0.png", "p1.png"]
    with pytest.warns(UserWarning, match="left out 4 images"):
        assert len(find_examples(tmp_path, prompt="one for all")) == 2


def test_captions_without_an_image_are_named(tmp_path):
    numbered(tmp_path, 2)
    (tmp_path / "readme.txt").write_text("no caption")
    with pytest.warns(UserWarning, match=r"1 captions have no image: readme\.txt"):
        assert names(tmp_path) == ["p0.png", "p1.png"]


def test_captions_in_capital_suffixes_are_read(tmp_path):
    for k, suffix in enumerate((".TXT", ".Txt", ".txt")):
        ramp(k).save(tmp_path / f"{k}.PNG")
        (tmp_path / f"{k}{suffix}").write_text(f"caption {k}")
    assert [example.caption for example in find_examples(tmp_path)] == ["caption 0", "caption 1", "caption 2"]


def test_a_folder_may_be_called_like_an_image(tmp_path):
    numbered(tmp_path, 1)
    numbered(tmp_path / "album.png", 2)
    assert names(tmp_path) == ["album.png/p0.png", "album.png/p1.png", "p0.png"]


def test_linked_folders_are_read_and_loops_are_not_followed(tmp_path):
    numbered(tmp_path / "elsewhere", 3)
    numbered(tmp_path / "photos" / "own", 2)
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "photos" / "own" / "parent").symlink_to(tmp_path / "photos", target_is_directory=True)
    with pytest.warns(UserWarning, match="parent leads to a folder that is read already"):
        found = names(tmp_path / "photos")
    assert found == ["linked/p0.png", "linked/p1.png", "linked/p2.png", "own/p0.png", "own/p1.png"]


def test_a_folder_of_links_alone_is_read(tmp_path):
    numbered(tmp_path / "elsewhere", 2)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(tmp_path / "photos") == ["linked/p0.png", "linked/p1.png"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    numbered(tmp_path, 1)
    numbered(tmp_path / ".thumbnails", 1)
    ramp().save(tmp_path / "._p0.png")
    assert names(tmp_path) == ["p0.png"]


def test_a_folder_without_readable_images_says_so(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"a\.heic"), pytest.raises(SettingsError, match="contains no images"):
        find_examples(tmp_path)
