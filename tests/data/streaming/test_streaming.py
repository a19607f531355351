"""A streamed set gives the images and captions that it was packed from, over HTTP as from a local disk."""

from __future__ import annotations

import json
import re
import resource
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdmodule.cli.main import train_main
from sdmodule.data import ImageFolderDataModule, StreamingDataModule
from sdmodule.data.streaming.sampler import StreamSampler
from sdmodule.errors import SettingsError
from tests.data.streaming.conftest import call_pack


def module(url: object, tmp_path: Path, **settings) -> StreamingDataModule:
    """The data module of a set, set up."""
    own = {"resolution": 32, "batch_size": 4, "cache_folder": str(tmp_path / "shards"), **settings}
    data = StreamingDataModule(str(url) if isinstance(url, Path) else url, **own)
    data.setup("fit")
    return data


def by_caption(data) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of all training examples by their captions."""
    found = [data.train_set[k] for k in range(len(data.train_set))]
    return {example.pop("caption"): example for example in found}


def same(ours, theirs) -> bool:
    names = ours.keys() == theirs.keys()
    return names and all(all(torch.equal(ours[key][n], theirs[key][n]) for n in theirs[key]) for key in ours)


def requests(tmp_path: Path) -> Counter[str]:
    """How often each file was asked for."""
    return Counter(re.findall(r'"GET /(\S+) HTTP', (tmp_path / "requests").read_text()))


@pytest.mark.parametrize("buckets", [False, True])
def test_the_examples_are_those_of_the_folder(scenes, packed, serve, tmp_path, buckets):
    folder = ImageFolderDataModule(str(scenes), 32, val_fraction=0, buckets=buckets)
    folder.setup("fit")
    streamed = module(serve(packed), tmp_path, buckets=buckets)
    assert same(by_caption(streamed), by_caption(folder))
    assert same(by_caption(module(packed, tmp_path, buckets=buckets)), by_caption(folder))
    sizes = {batch["image"].shape for batch in streamed.train_dataloader()}
    assert len(sizes) == (3 if buckets else 1)


def test_loading_processes_share_the_shards_and_each_is_fetched_once(packed, serve, tmp_path):
    data = module(serve(packed), tmp_path, num_workers=2, buckets=True)
    shown = Counter(text for batch in data.train_dataloader() for text in batch["caption"])
    assert len(shown) == 24
    asked = requests(tmp_path)
    assert asked.pop("index.json") == 1 and len(asked) == 9 and set(asked.values()) == {1}
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".tar"}


def test_an_epoch_over_changing_numbers_of_processes_is_the_data_set(packed, serve, tmp_path):
    """1, 2, 3 and again 1 process at one global batch; the ranks of a start are samplers in this process."""
    data = module(serve(packed), tmp_path, buckets=True)
    shown: Counter[str] = Counter()
    done, state = 0, None
    for devices, seen in ((1, 1), (2, 1), (3, 1), (1, 99)):
        parts = []
        for rank in range(devices):
            sampler = StreamSampler(data.train_set, data.samples, 6 // devices, devices, rank, window=1)
            assert sampler.resume(0, done, state) == done
            parts.append(list(sampler)[: seen * 6 // devices])
        shown.update(data.train_set[k]["caption"] for part in parts for k in part)
        done, state = done + seen, sampler.state()
    texts = [data.train_set[k]["caption"] for k in range(24)]
    assert shown.keys() == set(texts) and sum(shown.values()) == 36  # six batches, each bucket's last one filled up
    once = [texts[k] for batch in _batches(data) for k in batch]
    assert shown == Counter(once)


def _batches(data):
    order = StreamSampler(data.train_set, data.samples, 6, window=1)
    flat = list(order)
    return [flat[k : k + 6] for k in range(0, len(flat), 6)]


def test_local_disk_holds_no_more_than_was_asked_for(packed, serve, tmp_path):
    sizes = sorted((path.stat().st_size for path in packed.glob("*.tar")), reverse=True)
    limit = sum(sizes[:4])
    for left in ("dead.lock", "dead.part"):  # of a process that was killed while it fetched
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / left).write_text("100000000")
    data = module(serve(packed), tmp_path, shuffle_window=1, cache_gb=limit / 1e9)
    most = 0
    for k in list(StreamSampler(data.train_set, data.samples, 4, window=1)) * 2:
        assert data.train_set[k]["image"].shape == (3, 32, 32)
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar")))
    assert sizes[0] < most <= limit and {path.suffix for path in (tmp_path / "shards").iterdir()} == {".tar"}
    assert set(requests(tmp_path).values()) > {1}, "shards were deleted and fetched again"
    with pytest.raises(SettingsError, match=r"data.cache_gb=\S+: must be at least \S+ for data.url=http"):
        module(data.source.url, tmp_path, shuffle_window=8, cache_gb=limit / 1e9)
    module(packed, tmp_path, shuffle_window=8, cache_gb=limit / 1e9)  # a local set is read where it is


def test_tars_without_an_index_are_read_once_to_make_one(scenes, plain, serve, tmp_path, capfd):
    folder = tmp_path / "raw"
    folder.mkdir()
    names = sorted(scenes.glob("*.png"))
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in names[number * 8 : number * 8 + 8]:
                tar.add(name, name.name)
                tar.add(name.with_suffix(".txt"), f"{name.stem}.txt")
    url = serve(folder)
    data = module(f"{url}/{{0..2}}.tar", tmp_path, val_fraction=0.25)
    assert "has no index; reading all shards once to make one: 3" in "".join(capfd.readouterr())
    assert len(data.train_set) == 18 and len(data.val_set) == 6
    texts = {data.train_set[k]["caption"] for k in range(18)} | {data.val_set[k]["caption"] for k in range(6)}
    assert texts == {name.with_suffix(".txt").read_text() for name in names}
    before = requests(tmp_path)
    module(f"{url}/{{0..2}}.tar", tmp_path)
    assert requests(tmp_path) == before and "has no index" not in "".join(capfd.readouterr())
    local = module(f"{folder}/*.tar", tmp_path / "other", val_fraction=0.25)
    assert len(local.train_set) + len(local.val_set) == 24


def test_what_cannot_be_read_is_left_out_if_asked(scenes, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    tar = tmp_path / "raw.tar"
    with tarfile.open(tar, "w") as file:
        for name, text in ((scenes / "00.png", "good"), (bad, "bad"), (scenes / "01.png", "fine"), (bad, None)):
            key = f"{len(file.getmembers()):02}"
            file.add(name, f"{key}.png")
            if text is not None:
                (tmp_path / "text").write_text(text)
                file.add(tmp_path / "text", f"{key}.txt")
    with pytest.raises(SettingsError, match=r"data.url=\S+raw.tar: 06.png has no caption"):
        module(tar, tmp_path)
    skipping = module(tar, tmp_path, skip_bad=True)
    assert [skipping.train_set[k]["caption"] for k in range(3)] == ["good", "fine", "fine"]
    strict = module(tar, tmp_path / "other", skip_bad=True)
    strict.train_set.skip_bad = False
    with pytest.raises(SettingsError, match=r"raw.tar/02.png cannot be decoded"):
        strict.train_set[1]


def test_masks_control_images_and_styles_are_packed_too(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for k in range(4):
        for kind, colour in (("", (60 * k, 9, 200)), ("m", (255 * (k % 2),) * 3), ("c", (9, 60 * k, 0))):
            Image.new("RGB", (40, 48), colour).save(folder / f"{kind}{k}.png")
        names = {"mask_file_name": f"m{k}.png", "conditioning_image_file_name": f"c{k}.png"}
        rows.append({"file_name": f"{k}.png", "text": f"tag {k}, red, old, small", **names})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [f"data.root={folder}", "data.val_fraction=0", "data.shuffle_tags=true", "data.keep_tags=1"]
    call_pack(*source, f"output_dir={tmp_path / 'set'}", "samples_per_shard=3")
    local = ImageFolderDataModule(str(folder), 32, val_fraction=0, conditioning="files")
    local.setup("fit")
    streamed = module(tmp_path / "set", tmp_path, conditioning="files", template="a {}")
    assert not streamed.bare
    assert same({text.removeprefix("a "): one for text, one in by_caption(streamed).items()}, by_caption(local))
    packed_style = module(tmp_path / "set", tmp_path).train_set
    epochs = []
    for epoch in range(4):
        packed_style.set_epoch(epoch)
        epochs.append(packed_style.caption(0))
    assert len(set(epochs)) > 1 and len({text.partition(",")[0] for text in epochs}) == 1
    assert not packed_style.fixed_captions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "URL/none"}, r"data.url=http://127\S+/none: has no index.json; give a folder that python -m"),
        ({"url": "URL/none.tar"}, r"data.url=http://127\S+/none.tar: does not exist; check the address"),
        ({"url": "http://127.0.0.1:9/set"}, r"data.url=http://127.0.0.1:9\S+: cannot be read \(.*; check the address"),
        ({"url": "pipe:cat x.tar"}, r"data.url=pipe:cat x.tar: .*"),
        ({"url": "gopher://host/set"}, r"data.url=gopher://\S+: gopher is not known as a protocol; give a local path"),
        ({"url": "gs://bucket/set"}, r"data.url=gs://\S+: needs the package gcsfs; pip install 'sdmodule\[gcs\]'"),
        ({"url": "nowhere"}, r"data.url=nowhere: has no index.json"),
        ({"val_url": "nowhere"}, r"data.val_url=nowhere: has no index.json"),
        ({"buckets": True}, r"data.buckets=true: data.url=\S+ was packed without buckets; pack it with"),
        ({"conditioning": "files"}, r"data.conditioning=files: data.url=\S+ has no control images"),
        ({"shuffle_window": 0}, r"data.shuffle_window=0: must be a whole number of at least 1"),
        ({"cache_gb": 0}, r"data.cache_gb=0: must be a number greater than 0"),
        ({"url": 3}, r"data.url=3: must be a non-empty path"),
    ],
    ids=str,
)
def test_a_wrong_set_is_one_sentence(plain, serve, tmp_path, settings, message):
    url = settings.pop("url", str(plain))
    if isinstance(url, str) and url.startswith("URL"):
        url = url.replace("URL", serve(plain))
    with pytest.raises(SettingsError, match=message):
        module(url, tmp_path, **settings)


def test_a_damaged_shard_is_one_sentence(plain, serve, tmp_path, monkeypatch):
    broken = shutil.copytree(plain, tmp_path / "broken")
    first = sorted(broken.glob("train-*.tar"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-700])
    url = serve(broken)
    for place, known in ((broken, f"data.url={first}: has"), (url, f"data.url={url}/{first.name}: cannot be read")):
        data = module(place, tmp_path)
        with pytest.raises(SettingsError, match=re.escape(known)) as raised:
            data.train_set[0]
        assert "instead of" in str(raised.value) and "truncated" in str(raised.value)
    first.write_bytes(whole[:-1500] + b"x" * 1500)
    with pytest.raises(SettingsError, match="its bytes are not those that were packed"):
        module(url, tmp_path).train_set[0]
    for content in (whole[:1000], b"no tar" * 1000):
        first.write_bytes(content)
        with pytest.raises(SettingsError, match=r"train-000000.tar: cannot be read \(.*; give complete, uncompressed"):
            module(f"{url}/{first.name}", tmp_path)
    first.unlink()
    with pytest.raises(SettingsError, match=r"train-000000.tar: does not exist"):
        module(url, tmp_path).train_set[0]
    assert not [path for path in (tmp_path / "shards").iterdir() if path.suffix != ".json"], "nothing half-written"


def test_a_full_disk_is_one_sentence(plain, serve, tmp_path):
    data = module(serve(plain), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(SettingsError, match=r"data.cache_folder=\S+: cannot be written \(File too large\); free"):
            data.train_set[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert data.train_set[0]["image"].shape == (3, 32, 32)


def test_the_command_names_what_a_set_lacks_before_it_writes(packed, plain, checkpoint, xl_checkpoint, call, tmp_path):
    base = ["data=streaming", f"output_dir={tmp_path / 'out'}", "trainer.max_steps=1", "resolution=32"]
    for settings, wanted in (
        ([f"data.url={plain}", "cache=latents"], "was packed without latents, and a streamed set is not encoded"),
        ([f"data.url={packed}", "cache=all", "data.buckets=true"], f"with the VAE of pretrained={checkpoint}, which"),
        ([f"data.url={packed}", f"pretrained={checkpoint}", "cache=latents"], "in buckets, and this training is with"),
        (
            [f"data.url={packed}", f"pretrained={checkpoint}", "cache=latents", "resolution=64"],
            "for resolution=32, and this is 64",
        ),
        ([f"data.url={packed}", "data.buckets=true", "resolution=64"], "was packed for resolution=32"),
    ):
        status, _, error = call(train_main, *base, *settings)
        assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and wanted in error, error
    assert not (tmp_path / "out").exists()
