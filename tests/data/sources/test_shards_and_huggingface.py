"""Tar shards and Hugging Face data sets give the same batches as a folder of the same images."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from sdmodule.cli.main import train_main
from sdmodule.data.datamodule import (
    HuggingFaceDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    ShardsDataModule,
)
from sdmodule.data.sources.path_patterns import expand_braces
from sdmodule.errors import SettingsError

SHAPES = [(40, 40), (64, 32), (32, 64), (60, 31), (38, 41), (36, 72), (64, 40), (33, 33), (70, 35)]
COMMON: dict[str, Any] = {"resolution": 32, "batch_size": 2, "val_fraction": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images of noise in three shapes; some are rotated by EXIF, one is transparent."""
    photos = tmp_path / "photos"
    photos.mkdir()
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for k, shape in enumerate(SHAPES):
        image = Image.frombytes("RGB", shape, random.Random(k).randbytes(3 * shape[0] * shape[1]))
        if k == 3:
            image.putalpha(128)
        if k % 4 == 1:
            image.save(photos / f"{k}.jpg", exif=sideways)
        else:
            image.save(photos / f"{k}.png")
        (photos / f"{k}.txt").write_text(f"tag {k}, red, small, old, wise")
    return photos


def rows(folder: Path) -> dict[str, list[Any]]:
    files = sorted(file for file in folder.iterdir() if file.suffix != ".txt")
    return {"image": [str(file) for file in files], "text": [file.with_suffix(".txt").read_text() for file in files]}


def dataset(folder: Path) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows(folder), features)


def parquet(folder: Path, target: Path) -> HuggingFaceDataModule:
    for k in range(2):  # with the files' bytes in them, as on the hub
        part = dataset(folder).shard(2, k, contiguous=True)
        (target / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(target / "data" / f"train-{k:05}-of-00002.parquet")
    return HuggingFaceDataModule(str(target), **SETTINGS)


def plain_bytes(folder: Path, target: Path) -> HuggingFaceDataModule:
    target.mkdir()
    held = rows(folder)
    table = pa.table({"jpg": [Path(file).read_bytes() for file in held["image"]], "caption": held["text"]})
    pq.write_table(table, target / "train.parquet")
    return HuggingFaceDataModule(str(target), image_column="jpg", caption_column="caption", **SETTINGS)


def arrow(folder: Path, target: Path) -> HuggingFaceDataModule:
    dataset(folder).save_to_disk(target)
    return HuggingFaceDataModule(str(target), **SETTINGS)


def arrow_of_splits(folder: Path, target: Path) -> HuggingFaceDataModule:
    datasets.DatasetDict({"test": dataset(folder).select([0]), "all": dataset(folder)}).save_to_disk(target)
    return HuggingFaceDataModule(str(target), "all", **SETTINGS)


def imagefolder(folder: Path, target: Path) -> HuggingFaceDataModule:
    held = rows(folder)
    lines = [{"file_name": Path(f).name, "text": text} for f, text in zip(held["image"], held["text"], strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in folder.glob("*.txt"):
        file.unlink()
    return HuggingFaceDataModule(str(folder), **SETTINGS)


def shards(folder: Path, target: Path, caption: str = "txt", **settings: Any) -> ShardsDataModule:
    target.mkdir()
    with webdataset.ShardWriter(f"{target}/%03d.tar", maxcount=4, verbose=0) as writer:
        for file, text in zip(*rows(folder).values(), strict=True):
            content = text if caption == "txt" else {"caption": text, "url": "…"}
            image = {Path(file).suffix[1:]: Path(file).read_bytes()}
            writer.write({"__key__": f"0/{Path(file).stem}", **image, caption: content})
    return ShardsDataModule(f"{target}/{{000..002}}.tar", **{**SETTINGS, **settings})


def shards_of_json(folder: Path, target: Path) -> ShardsDataModule:
    return shards(folder, target, "json")


SETTINGS = {**COMMON, "buckets": True, "center_crop": False, "random_flip": True, "shuffle_tags": True}
KINDS = [parquet, plain_bytes, arrow, arrow_of_splits, imagefolder, shards, shards_of_json]


def ready(data: ImageDataModule) -> ImageDataModule:
    data.setup()
    return data


def epochs(data: ImageDataModule, count: int = 2) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize("make", KINDS)
def test_batches_equal_those_of_a_folder(folder, tmp_path, make):
    theirs = epochs(ready(ImageFolderDataModule(str(folder), **SETTINGS)))
    ours = epochs(ready(make(folder, tmp_path / "made")))
    assert [batch["caption"] for batch in ours] == [batch["caption"] for batch in theirs]
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(ours, theirs, strict=True))
    assert len({batch["image"].shape for batch in ours}) == 3


@pytest.mark.parametrize("make", [parquet, shards])
def test_cache_keys_depend_on_content_alone(folder, tmp_path, make):
    theirs = ready(ImageFolderDataModule(str(folder), **COMMON)).train_set
    ours = ready(make(folder, tmp_path / "made")).train_set
    assert [ours.content(k) for k in range(9)] == [theirs.content(k) for k in range(9)]


@pytest.mark.parametrize("make", [parquet, shards])
def test_pixels_stay_on_disk_and_workers_read_them(folder, tmp_path, make):
    data = ready(make(folder, tmp_path / "made"))
    alone = epochs(data)
    data.num_workers = 2
    together = epochs(data)
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(alone, together, strict=True))
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert len(pickle.dumps(data.train_set)) < size / 3


@pytest.mark.parametrize("make", [parquet, shards])
def test_validation_is_chosen_by_name_or_is_another_split(folder, tmp_path, make):
    data = make(folder, tmp_path / "made")
    data.val_fraction = 0.3
    captions = [sorted(batch["caption"]) for batch in ready(data).val_dataloader()]
    assert len(data.val_set) == 3 and len(data.train_set) == 6
    again = type(data)(data.sources[0].source.shards if make is shards else str(tmp_path / "made"), **COMMON)
    again.val_fraction = 0.3
    assert [sorted(batch["caption"]) for batch in ready(again).val_dataloader()] == captions

    if make is shards:
        other = ShardsDataModule(f"{tmp_path}/made/00[01].tar", f"{tmp_path}/made/002.tar", template="a {}", **COMMON)
    else:
        arrow_of_splits(folder, tmp_path / "splits")
        other = HuggingFaceDataModule(str(tmp_path / "splits"), "all", "test", template="a {}", **COMMON)
    [validated] = ready(other).val_dataloader()
    assert len(other.train_set) == (8 if make is shards else 9)
    assert validated["caption"] == [f"a tag {8 if make is shards else 0}, red, small, old, wise"]


def test_sources_of_all_kinds_are_mixed_by_weight(folder, tmp_path):
    shards(folder, tmp_path / "tars")
    parquet(folder, tmp_path / "parquet")
    sources = [
        {"root": str(folder), "template": "folder {}"},
        {"shards": f"{tmp_path}/tars/*.tar", "weight": 2, "template": "shard {}", "shuffle_tags": True},
        {"name": str(tmp_path / "parquet"), "template": "parquet {}"},
    ]
    data = ready(ImageFolderDataModule(None, sources=sources, **{**COMMON, "batch_size": 1}))
    kinds = [caption.split()[0] for batch in epochs(data, 1) for caption in batch["caption"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"folder": 9, "shard": 18, "parquet": 9}
    assert not data.train_set.fixed_captions


def add(shard: Path, **files: bytes) -> str:
    """Write a tar of files; ``_`` in their names stands for a dot."""
    with tarfile.open(shard, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(shard)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "contains no images"),
        ({"a_png": png()}, r"images without a caption: a\.tar/a\.png"),
        ({"a_png": png(), "a_jpg": png(), "a_txt": b"a"}, r"a\.tar/a\.jpg and a\.tar/a\.png have the same name"),
        (
            {"a_png": png(), "a_json": b'{"text": "a"}'},
            r"caption_key=caption: .* no string under this key, only text",
        ),
        ({"a_png": png(), "a_json": b"[1]"}, "no string under this key, and is not an object"),
        ({"a_png": png(), "a_json": b"{"}, r"the caption a\.tar/a\.json cannot be read"),
        ({"a_png": png(), "a_txt": b"\xff\xfe"}, r"the caption a\.tar/a\.txt cannot be read"),
        (
            {"a_png": b"<html>", "a_txt": b"a"},
            r"unreadable image: a\.tar/a\.png \(not one of AVIF.*skip_bad",
        ),
    ],
)
def test_unusable_shards_are_errors(tmp_path, files, says):
    with pytest.raises(SettingsError, match=says):
        ready(ShardsDataModule(add(tmp_path / "a.tar", **files), **COMMON))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{000..002}.tar", r"001\.tar does not exist"),
        ("broken.tar", r"broken\.tar cannot be read .*uncompressed"),
        ("packed.tar", r"packed\.tar cannot be read .*uncompressed"),
        ([], "names no files"),
        ("{3..1}.tar", "names no files"),
    ],
)
def test_missing_or_truncated_shards_are_errors(tmp_path, pattern, says):
    whole = Path(add(tmp_path / "000.tar", a_png=png(), a_txt=b"a", b_png=png(), b_txt=b"b"))
    (tmp_path / "broken.tar").write_bytes(whole.read_bytes()[:2300])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(whole, "a.png")
    given = pattern if isinstance(pattern, list) else str(tmp_path / pattern)
    with pytest.raises(SettingsError, match=says):
        ready(ShardsDataModule(given, **COMMON))


def test_ignored_files_in_shards_are_reported(tmp_path):
    files = {"a_png": png(), "a_txt": b"a", "a_json": b"{}", "a_cls": b"1", "b_png": b"<html>", "b_txt": b"b"}
    given = add(tmp_path / "a.tar", **files)
    with pytest.warns(UserWarning) as warned:
        data = ready(ShardsDataModule(given, skip_bad=True, **COMMON))
    assert len(data.train_set) == 1 and data.train_set[0]["caption"] == "a"
    told = " ".join(str(warning.message) for warning in warned)
    assert "neither image nor caption: 1 .cls." in told and "skipped 1 unreadable image: a.tar/b.png" in told


@pytest.mark.parametrize(
    ("pattern", "stands_for"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{9..10}", ["9", "10"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, stands_for):
    assert expand_braces(pattern) == stands_for


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"caption_column": "title"},
            r"caption_column=title: is not a column .*; choose one of image, number, text",
        ),
        ({"caption_column": "number"}, r"caption_column=number: contains .*int64.*; give a column of strings"),
        ({"image_column": "text"}, r"image_column=text: contains .*string.*; give a column of images"),
        ({"split": "val"}, r"split=val: cannot be loaded .*train"),
        ({"subset": "xl"}, "cannot be loaded .*xl"),
        ({"name": "nobody/nothing"}, "nobody/nothing split=train: cannot be loaded"),
        ({}, r"caption_column=text: is empty in row 2 of data\.name"),
    ],
)
def test_unusable_data_sets_are_errors(folder, tmp_path, settings, says):
    held = rows(folder)
    texts = [*held["text"][:2], None, *held["text"][3:]]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "number": datasets.Value("int64")}
    )
    columns = {"image": held["image"], "text": texts, "number": list(range(9))}
    (tmp_path / "made").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "made" / "train.parquet")
    with pytest.raises(SettingsError, match=says):
        ready(HuggingFaceDataModule(**{"name": str(tmp_path / "made"), **COMMON, **settings}))


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingsError, match=r"needs the package datasets; pip install 'sdmodule\[datasets\]'"):
        ready(HuggingFaceDataModule("owner/name"))


def test_code_in_a_data_set_is_not_run(folder, tmp_path):
    parquet(folder, tmp_path / "made")
    (tmp_path / "made" / "made.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nraise SystemExit")
    try:
        ready(HuggingFaceDataModule(str(tmp_path / "made"), **COMMON))
    except SettingsError as error:
        assert "cannot be loaded" in str(error)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"weight": 2}, r"data\.sources\[0\]: gives no source; give exactly one of name, root, shards"),
        ({"root": "a", "shards": "b"}, r"gives root, shards; give exactly one of"),
        ({"shards": "a", "split": "train"}, r"data\.sources\[0\]: cannot be used .*split"),
    ],
)
def test_entries_of_a_mixture_give_one_source_each(source, says):
    with pytest.raises(SettingsError, match=says):
        ImageFolderDataModule(None, sources=[source])


@pytest.mark.parametrize("make", [parquet, shards])
def test_the_train_command_reads_them(folder, tmp_path, checkpoint, call, make):
    make(folder, tmp_path / "made")
    if make is shards:
        given = ["data=webdataset", f"data.shards={tmp_path}/made/{{000..002}}.tar"]
    else:
        given = ["data=huggingface", f"data.name={tmp_path / 'made'}"]
    common = [f"pretrained={checkpoint}", "resolution=32", "trainer.max_steps=4", "data.buckets=true", "cache=all"]
    common += [f"cache.folder={tmp_path / 'cache'}", "callbacks=[export]", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(train_main, *given, *common)
    assert status == 0, complaint
    assert (tmp_path / "out" / "export" / "model_index.json").is_file()
