"""The pack command: the same bytes whatever packs them, resumed after a kill, and nothing mixed up."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from benchmarks.forked import Command
from sdmodule.cli.main import pack_main
from sdmodule.data import StreamingDataModule


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a folder, by their names."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_packing_is_resumed_to_the_same_bytes_by_any_number_of_processes(scenes, packed, checkpoint, tmp_path):
    command = [f"data.root={scenes}", f"output_dir={tmp_path / 'set'}", f"pretrained={checkpoint}", "encode=all"]
    command += ["samples_per_shard=3", "data.val_fraction=0", "data.buckets=true", "data.random_flip=true"]
    killed = Command("pack", *command, "processes=2", log=tmp_path / "log")
    assert killed.kill(lambda: any((tmp_path / "set" / ".packing").glob("*.json")))
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")}
    assert not (tmp_path / "set" / "index.json").exists() and len(left) < 9
    status, output = Command("pack", *command, "processes=2", log=tmp_path / "log").wait()
    assert status == 0 and "Packed 24 samples in 9 shards" in output, output
    assert content(tmp_path / "set") == content(packed)
    records = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")}
    assert sum(records[name] == when for name, when in left.items()) >= len(left) - 2, "complete shards stay"


def test_a_set_is_not_mixed_with_another(scenes, plain, call, tmp_path):
    command = [f"data.root={scenes}", "samples_per_shard=3", "processes=0"]
    whole = content(plain)
    status, printed, error = call(pack_main, *command, "data.val_fraction=0.125", f"output_dir={plain}")
    assert status == 0 and not error and "Packed 24 samples" in printed, "it is complete"
    for settings, folder, wanted in (
        ([], plain, "holds a set that was packed from other settings; choose another folder"),
        ([], scenes, "holds other files; give an empty or a new folder"),
        (["data.buckets=true"], tmp_path / "new", "resolution: missing; buckets are sizes near it"),
        (["data.center_crop=false", "encode=latents"], tmp_path / "new", "data.center_crop=false: crops images at"),
        (["encode=some"], tmp_path / "new", "encode=some: unknown; choose one of all, latents, none"),
        (["samples_per_shard=0"], tmp_path / "new", "samples_per_shard=0: must be a whole number of at least 1"),
        (["processes=-1"], tmp_path / "new", "processes=-1: must be a whole number of at least 0"),
        (["device=cuda:9"], tmp_path / "new", "device=cuda:9: there is no such device"),
    ):
        status, _, error = call(pack_main, *command, f"output_dir={folder}", *settings)
        assert status == 1 and wanted in error and error.count("\n") == 1, error
    assert content(plain) == whole and not (tmp_path / "new").exists()


def test_other_tools_read_a_set(scenes, plain):
    shards = sorted(map(str, plain.glob("*.tar")))
    rows = list(webdataset.WebDataset(shards, shardshuffle=False))
    texts = {json.loads(row["json"])["caption"] for row in rows}
    assert texts == {path.read_text() for path in scenes.glob("*.txt")}
    assert {row["png"] for row in rows} == {path.read_bytes() for path in scenes.glob("*.png")}
    index = json.loads((plain / "index.json").read_text())
    assert sum(index["shards"]["samples"]) == 24 and sum(index["shards"]["validation"]) == 1
    data = StreamingDataModule(str(plain))
    data.setup("fit")
    assert len(data.train_set) == 21 and len(data.val_set) == 3


def test_scenes_that_are_drawn_and_streamed_sets_are_packed_too(call, plain, tmp_path):
    status, _, error = call(
        pack_main,
        "data=shapes",
        "data.train_length=5",
        "data.val_length=2",
        f"output_dir={tmp_path / 'drawn'}",
        "processes=0",
    )
    assert status == 0, error
    with tarfile.open(tmp_path / "drawn" / "train-000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.png", "000000000.json"] and len(tar.getnames()) == 10
    again = ["data=streaming", f"data.url={plain}", f"output_dir={tmp_path / 'again'}", "samples_per_shard=50"]
    status, printed, error = call(pack_main, *again, "processes=0")
    assert status == 0 and "Packed 24 samples in 2 shards" in printed, error


def test_the_module_is_the_command(monkeypatch, capfd):
    import runpy

    monkeypatch.setattr(sys, "argv", ["pack", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("sdmodule.data.pack", run_name="__main__")
    assert "python -m sdmodule.data.pack data.root=my_photos output_dir=packed" in " ".join(
        capfd.readouterr().out.split()
    )
