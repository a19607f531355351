"""Sources mixed by weight, and the styles of their captions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.errors import SettingsError


def make(folder: Path, count: int, text: str) -> str:
    folder.mkdir()
    for k in range(count):
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(folder / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": text.format(k)} for k in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def ready(**settings: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(**{"root": None, "resolution": 8, "batch_size": 1, "val_fraction": 0, **settings})
    data.setup()
    return data


def shown(data: ImageFolderDataModule) -> list[str]:
    return [caption for batch in data.train_dataloader() for caption in batch["caption"]]


def test_an_epoch_shows_each_source_by_weight_and_every_image(tmp_path):
    few, many = make(tmp_path / "few", 3, "few {}"), make(tmp_path / "many", 10, "many {}")
    counts = Counter(shown(ready(sources=[{"root": few, "weight": 2}, {"root": many}])))
    assert counts == {"few 0": 7, "few 1": 7, "few 2": 6} | {f"many {k}": 1 for k in range(10)}


def test_each_source_gives_validation_images(tmp_path):
    sources = [{"root": make(tmp_path / name, 4, f"{name} {{}}")} for name in ("a", "b")]
    data = ready(sources=sources, val_fraction=0.25)
    validated = {caption for batch in data.val_dataloader() for caption in batch["caption"]}
    assert sorted(caption[0] for caption in validated) == ["a", "b"]
    assert not validated & set(shown(data)) and len(shown(data)) == 6


def test_masks_are_kept_only_if_all_sources_have_them(tmp_path):
    one, other, bare = (make(tmp_path / name, 2, name) for name in ("one", "other", "bare"))
    for folder in (one, other):
        rows = [json.dumps({"file_name": "0.png", "text": folder, "mask_file_name": "1.png"})]
        (Path(folder) / "metadata.jsonl").write_text("\n".join(rows))
    data = ready(sources=[{"root": one}, {"root": bare}], batch_size=4)
    [batch] = data.train_dataloader()
    assert batch.keys() == {"image", "caption", "original_size", "crop_top_left"} and len(batch["image"]) == 4
    [batch] = ready(sources=[{"root": one}, {"root": other}], batch_size=2).train_dataloader()
    assert batch["mask"].shape == (2, 1, 8, 8)


def test_tags_after_the_kept_ones_are_shuffled_by_epoch(tmp_path):
    folder = make(tmp_path / "a", 1, "cat, red, small, old, wise")
    data = ready(root=folder, shuffle_tags=True, keep_tags=1, template="a photo of {}!")
    orders = []
    for epoch in (0, 1, 2, 0):
        data.train_set.set_epoch(epoch)
        [text] = {data.train_set[0]["caption"]}
        assert text.startswith("a photo of cat, ") and text.endswith("!")
        tags = text.removeprefix("a photo of ").removesuffix("!").split(", ")
        assert sorted(tags) == sorted(["cat", "red", "small", "old", "wise"])
        orders.append(tags)
    assert orders[0] == orders[3] and len({*map(tuple, orders)}) > 1


def test_a_source_has_its_own_caption_style_or_the_common_one(tmp_path):
    one, other = make(tmp_path / "one", 1, "cat"), make(tmp_path / "other", 1, "dog")
    data = ready(sources=[{"root": one}, {"root": other, "template": "{}, drawn"}], template="a photo of a {}")
    assert sorted(shown(data)) == ["a photo of a cat", "dog, drawn"]


def test_the_common_prompt_is_for_folders_without_their_own(tmp_path):
    one, other = make(tmp_path / "one", 1, "cat"), make(tmp_path / "other", 1, "dog")
    sources = [{"root": one}, {"root": other, "prompt": "a hound"}]
    assert sorted(shown(ready(sources=sources, prompt="a beast"))) == ["a beast", "a hound"]


def test_validation_captions_keep_the_order_of_their_tags(tmp_path):
    folder = make(tmp_path / "a", 2, "cat, red, small, old, wise")
    data = ready(root=folder, shuffle_tags=True, template="{}.", val_fraction=0.5)
    assert data.val_set[0]["caption"] == "cat, red, small, old, wise."


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"root": "FOLDER", "template": "a photo"}, r"data\.template=a photo: contains no \{\}; write \{\} where"),
        ({"root": "FOLDER", "keep_tags": -1}, r"data\.keep_tags=-1: must be a whole number of at least 0"),
        ({"sources": []}, r"data\.sources=\[\]: is empty; give \[\{root: …"),
        ({}, "give one of them"),
        ({"root": "FOLDER", "sources": [{"root": "FOLDER"}]}, "give one of them"),
        (
            {"sources": [{"root": "FOLDER", "weight": 0}]},
            r"data\.sources\[0\]\.weight=0: must be a number",
        ),
        ({"sources": [{"root": "FOLDER", "wieght": 1}]}, "wieght"),
        ({"sources": [{"root": "FOLDER"}, {"root": "nowhere"}]}, r"data\.sources\[1\]\.root=nowhere: does not exist"),
        ({"sources": "FOLDER"}, r"data\.sources=.*: must be a list of sources; give \[\{root: …"),
        ({"sources": ["FOLDER"]}, r"data\.sources=.*: must be a list of sources; give \[\{root: …"),
        ({"sources": [{"root": 2024}]}, r"data\.sources\[0\]\.root=2024: must be a non-empty path"),
        ({"sources": [{"shards": [1]}]}, r"data\.sources\[0\]\.shards=1: must be a non-empty path"),
        ({"sources": [{"name": None}]}, r"data\.sources\[0\]\.name=None: must be a non-empty path"),
        ({"root": ""}, r"data\.root=: must be a non-empty path"),
        ({"root": "FOLDER", "prompt": ["a", "b"]}, r"prompt=\['a', 'b'\] of data\.root=.*: must be one caption"),
        (
            {"sources": [{"root": "FOLDER"}, {"name": "a/b"}], "prompt": "a"},
            r"prompt=a: .*\[1\] gives name",
        ),
        ({"root": "FOLDER", "random_flip": "no"}, r"data\.random_flip=no: must be true or false"),
        (
            {"sources": [{"root": "FOLDER", "shuffle_tags": "no"}]},
            r"data\.sources\[0\]\.shuffle_tags=no: must be true or false",
        ),
    ],
)
def test_wrong_settings_are_errors(tmp_path, settings, says):
    folder = make(tmp_path / "a", 2, "cat")
    with pytest.raises(SettingsError, match=says):
        ready(**json.loads(json.dumps(settings).replace("FOLDER", folder)))
