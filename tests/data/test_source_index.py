"""What a start has learned about its images is kept: later starts, and other processes, read what has changed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from benchmarks.forked import FORKED
from sdmodule.data.datamodule import ImageFolderDataModule, ShardsDataModule
from sdmodule.data.index.columns import split_order
from sdmodule.data.sources import folder as source
from sdmodule.data.sources import verify
from sdmodule.data.sources.folder import Folder, find_examples
from sdmodule.data.sources.verify import readable_images
from sdmodule.errors import SettingsError
from sdmodule.io.fingerprint import file_fingerprint
from tests.reported.drawing import captioned, noise, numbered, ramp, shard

SETTINGS = {"resolution": 8, "batch_size": 1, "val_fraction": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that were decoded."""
    names: list[str] = []
    original = verify.open_image
    monkeypatch.setattr(verify, "open_image", lambda file: names.append(Path(str(file)).name) or original(file))
    return names


def aged(folder: Path, seconds: float = 60) -> Path:
    """Files of some time ago: a young one may be changed without a change of its date."""
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - seconds,) * 2)
    return folder


def start(folder: Path, **settings):
    data = ImageFolderDataModule(str(folder), **{**SETTINGS, **settings})
    data.setup()
    return data.train_set


def index_files(tmp_path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}


def test_what_is_kept_is_what_the_files_hold(tmp_path):
    folder = aged(numbered(tmp_path / "photos", 5))
    for _ in range(2):
        images = start(folder, buckets=True)
        for k in range(5):
            example = images.examples[k]
            assert images.content(k) == file_fingerprint(example.path)
            assert images.original_size(k) == Image.open(example.path).size[::-1]
            assert example.caption == example.path.with_suffix(".txt").read_text().strip()


def test_a_start_without_changes_writes_and_decodes_nothing(tmp_path, decoded):
    folder = aged(numbered(tmp_path / "photos", 4))
    start(folder)
    before = index_files(tmp_path)
    decoded.clear()
    start(folder)
    assert decoded == [] and index_files(tmp_path) == before


def test_changes_are_noticed_and_only_they_are_read(tmp_path, decoded):
    folder = aged(numbered(tmp_path / "photos", 4))
    start(folder)
    captioned(folder / "p1.png", noise(), "another")
    captioned(folder / "p9.png", ramp(9), "new")
    (folder / "p3.png").unlink()
    (folder / "p3.txt").unlink()
    decoded.clear()
    images = start(folder)
    assert sorted(decoded) == ["p1.png", "p9.png"]
    assert [images.caption(k) for k in range(4)] == ["p0", "another", "p2", "new"]
    assert [images.content(k) for k in range(4)] == [file_fingerprint(images.examples[k].path) for k in range(4)]


def test_of_an_image_with_another_date_the_content_decides(tmp_path, decoded):
    folder = aged(numbered(tmp_path / "photos", 3))
    start(folder)
    aged(folder, 30)
    decoded.clear()
    start(folder)
    assert decoded == []


def test_a_young_image_is_compared_even_if_its_date_is_the_same(tmp_path):
    folder = numbered(tmp_path / "photos", 3)
    start(folder)
    _spoil_unnoticeably(folder / "p1.png")
    with pytest.raises(SettingsError, match=r"unreadable image: p1\.png"):
        start(folder)


def test_contents_are_compared_when_asked(tmp_path):
    folder = aged(numbered(tmp_path / "photos", 3))
    start(folder)
    _spoil_unnoticeably(folder / "p1.png")
    assert len(start(folder)) == 3, "size and date say that nothing has changed"
    with pytest.raises(SettingsError, match=r"unreadable image: p1\.png"):
        start(folder, verify="content")
    with pytest.raises(SettingsError, match=r"cache\.verify=often"):
        start(folder, verify="often")


def _spoil_unnoticeably(file: Path) -> None:
    """Spoil an image without a change of its size and date."""
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_changed_captions_and_metadata_are_noticed(tmp_path):
    folder = aged(numbered(tmp_path / "photos", 3))
    start(folder)
    (folder / "p1.txt").write_text("changed")
    assert [start(folder).caption(k) for k in range(3)] == ["p0", "changed", "p2"]
    rows = [{"file_name": f"p{k}.png", "text": f"row {k}", "mask_file_name": f"p{k}.png"} for k in range(3)]
    for text in ("row 0", "other"):
        rows[0]["text"] = text
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        aged(folder)
        for _ in range(2):
            images = start(folder)
            assert images.caption(0) == text and images.examples[0].mask == folder / "p0.png"
    (folder / "p2.png").unlink()
    with pytest.raises(SettingsError, match=r"lists files that do not exist: p2\.png"):
        start(folder)


def test_changed_shards_are_noticed(tmp_path, decoded):
    for number in range(2):
        shard(tmp_path / f"{number}.tar", *(f"{number}-{k}" for k in range(3)))
    given = f"{tmp_path}/{{0..1}}.tar"

    def captions() -> list[str]:
        data = ShardsDataModule(given, **SETTINGS)
        data.setup()
        return [data.train_set.caption(k) for k in range(len(data.train_set))]

    aged(tmp_path)
    first = captions()
    decoded.clear()
    assert captions() == first and decoded == []
    shard(tmp_path / "1.tar", "1-0", "1-9")
    assert len(captions()) == 5 and "1-9.png" in decoded and not [name for name in decoded if name.startswith("0-")]


def test_a_damaged_index_is_made_again(tmp_path):
    folder = aged(numbered(tmp_path / "photos", 3))
    start(folder)
    for file in (tmp_path / "cache").rglob("*.*"):
        file.write_bytes(file.read_bytes()[:-30])
    assert len(start(folder)) == 3


def test_validation_is_chosen_by_the_sha_256_of_names(tmp_path):
    folder = numbered(tmp_path / "photos", 30)
    for _ in range(2):
        data = ImageFolderDataModule(str(folder), resolution=8, val_fraction=0.2)
        data.setup()
        names = sorted((file.name for file in folder.glob("*.png")), key=lambda n: hashlib.sha256(n.encode()).digest())
        assert {data.val_set.examples[k].path.name for k in range(len(data.val_set))} == set(names[:6])
    assert split_order([b"a", b"b", b"a"]).tolist() == sorted_places(["a", "b", "a"])


def sorted_places(names: list[str]) -> list[int]:
    ranked = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    return [ranked.index(name) for name in names]


def test_a_process_that_is_not_forked_maps_the_columns_itself(tmp_path):
    folder = aged(numbered(tmp_path / "photos", 200))
    images = start(folder)
    sent = pickle.dumps(images)
    assert len(sent) < 20 * 200 + 3000
    assert [pickle.loads(sent).caption(k) for k in (0, 199)] == [images.caption(0), images.caption(199)]
    captioned(folder / "p0.png", noise(), "changed")
    start(folder)  # replaces the file
    assert pickle.loads(pickle.dumps(images)).caption(0) == "p0"


def test_the_folder_may_be_read_only_and_is_not_written_to(tmp_path):
    folder = aged(numbered(tmp_path / "photos", 2))
    before = sorted(folder.iterdir())
    start(folder)
    assert sorted(folder.iterdir()) == before


def test_without_a_cache_folder_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="every start reads all images; set XDG_CACHE_HOME"):
        assert len(start(numbered(tmp_path / "photos", 2))) == 2


def _hold_the_index(folder: str, cache: str, held) -> None:
    """Begin to index, and never end."""
    os.environ["XDG_CACHE_HOME"] = cache
    verify.open_image = lambda file: (held.set(), time.sleep(600))
    readable_images(Folder(folder), skip_bad=False)


def _count_as_rank_1(folder: str, cache: str, result) -> None:
    """Send how many images there are, how many can be read, and how often the folder was listed."""
    os.environ["XDG_CACHE_HOME"] = cache
    rank_zero_only.rank = 1
    listed: list[object] = []
    original = source.list_files
    source.list_files = lambda place: listed.append(place) or original(place)
    examples, good = readable_images(Folder(folder), skip_bad=True)
    result.send((len(examples), len(good), len(listed)))


@pytest.mark.slow
def test_a_killed_indexer_blocks_nobody_and_other_ranks_take_the_index(tmp_path):
    folder = aged(numbered(tmp_path / "photos", 3))
    (folder / "p1.png").write_bytes(b"no image")
    held = FORKED.Event()
    stuck = FORKED.Process(target=_hold_the_index, args=(str(folder), str(tmp_path / "cache"), held))
    stuck.start()
    assert held.wait(60)
    results = []
    ranks = []
    for _ in range(2):
        ours, theirs = FORKED.Pipe()
        ranks.append(FORKED.Process(target=_count_as_rank_1, args=(str(folder), str(tmp_path / "cache"), theirs)))
        ranks[-1].start()
        results.append(ours)
    time.sleep(0.5)
    stuck.kill()
    found = [result.recv() for result in results if result.poll(60)]
    for rank in ranks:
        rank.join()
    assert sorted(found) == [(3, 2, 0), (3, 2, 1)], "one lists and reads, the other takes its index"


def test_columns_are_read_like_a_list(tmp_path):
    examples = find_examples(numbered(tmp_path, 4))
    assert [one.caption for one in examples] == [examples[k].caption for k in range(4)]
    assert examples[-1] == examples[3] and examples[1:3] == [examples[1], examples[2]]
    with pytest.raises(IndexError):
        examples[4]
    assert examples[np.int64(2)].caption == "p2"
    shutil.rmtree(tmp_path)
