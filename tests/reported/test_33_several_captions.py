"""Row 33: all captions of an image are for training, or all for validation."""

from __future__ import annotations

import pytest

from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.errors import SettingsError
from tests.reported.drawing import numbered, ramp


def test_all_captions_of_an_image_are_on_one_side(tmp_path):
    for file in numbered(tmp_path, 8).glob("*.txt"):
        file.unlink()
    rows = [f'{{"file_name": "p{k}.png", "text": "caption {j} of p{k}"}}' for k in range(8) for j in range(6)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    for fraction in (0.05, 0.3, 0.5):
        data = ImageFolderDataModule(str(tmp_path), resolution=8, val_fraction=fraction)
        data.setup()
        train, val = (
            {images.examples[k].path.name for k in range(len(images))} for images in (data.train_set, data.val_set)
        )
        assert not train & val and len(train | val) == 8 and len(val) == max(1, round(8 * fraction))


def test_one_image_with_several_captions_leaves_none_to_train_on(tmp_path):
    ramp().save(tmp_path / "p0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\np0.png,a\np0.png,b\n")
    data = ImageFolderDataModule(str(tmp_path), resolution=8, val_fraction=0.5)
    with pytest.raises(SettingsError, match="has a single image"):
        data.setup()
