"""Row 24: a shard whose name has the signs of a pattern is that shard, and no other."""

from __future__ import annotations

import pytest

from sdmodule.data.datamodule import ShardsDataModule
from tests.reported.drawing import shard


@pytest.mark.parametrize("folder", ["set[1]", "a{b}", "what?", "star*", "b[!x]"])
def test_a_path_that_exists_is_that_path(tmp_path, folder):
    """Shard names with the signs of patterns: the folder of that name is read, and no other that the pattern fits."""
    shard(tmp_path / folder / "000.tar", "a", "b", caption="wanted {}")
    for other in ("set1", "ab", "whatX", "starX", "by"):
        shard(tmp_path / other / "000.tar", "a", caption="other {}")
    for given in (f"{folder}/000.tar", f"{folder}/{{000..000}}.tar", f"{folder}/*.tar"):
        data = ShardsDataModule(str(tmp_path / given), resolution=8, val_fraction=0)
        data.setup()
        assert [data.train_set[k]["caption"] for k in range(len(data.train_set))] == ["wanted 0", "wanted 1"]


def test_a_shard_may_have_the_signs_of_a_pattern_in_its_own_name(tmp_path):
    shard(tmp_path / "part[1]-0.tar", "a", caption="wanted {}")
    shard(tmp_path / "part1-0.tar", "a", caption="other {}")
    data = ShardsDataModule(str(tmp_path / "part[1]-{0..0}.tar"), resolution=8, val_fraction=0)
    data.setup()
    assert data.train_set[0]["caption"] == "wanted 0"


def test_relative_shards_are_read_from_the_current_folder(tmp_path, monkeypatch):
    shard(tmp_path / "shards" / "000.tar", "a")
    monkeypatch.chdir(tmp_path)
    for given in ("shards/*.tar", "shards/{000,000}.tar", "*/000.tar", "./shards/000.tar"):
        assert {path.name for path in ShardsDataModule(given, resolution=8).sources[0].source.files()} == {"000.tar"}
