"""Row 18: a file name is only a name, whatever its bytes: in folders, in tar members, for validation."""

from __future__ import annotations

import os

import pytest

from sdmodule.cli.main import pack_main, train_main
from sdmodule.io.run_part import PartOfRun
from tests.reported.drawing import captioned, ramp, shard

pytestmark = pytest.mark.slow

LATIN = os.fsdecode("caf\xe9".encode("latin-1"))


@pytest.fixture
def folder(tmp_path):
    """Four images whose names are in Latin-1, in a folder that is called so too."""
    place = tmp_path / LATIN
    place.mkdir()
    for k in range(4):
        captioned(place / f"{LATIN}-{k}.png", ramp(k), f"p{k}")
    return place


def trained(call, checkpoint, out, *settings):
    common = [f"pretrained={checkpoint}", "trainer.max_steps=1", "+steps=1", "resolution=32", f"output_dir={out}"]
    status, _, errors = call(train_main, *common, *settings)
    assert status == 0 and "Traceback" not in errors, errors
    assert (out / "export").is_dir() and (out / "config.yaml").is_file()


def test_a_folder(call, checkpoint, folder, tmp_path):
    trained(call, checkpoint, tmp_path / "out", f"data.root={folder}", "cache=latents", "data.val_fraction=0.3")


def test_a_root_for_validation(call, checkpoint, folder, tmp_path):
    trained(call, checkpoint, tmp_path / "out", f"data.root={folder}", f"data.val_root={folder}")


def test_members_of_a_tar(call, checkpoint, tmp_path):
    shard(tmp_path / "0.tar", *(f"{LATIN}-{k}" for k in range(4)))
    settings = ["data=webdataset", f"data.shards={tmp_path}/0.tar", "data.val_fraction=0.3"]
    trained(call, checkpoint, tmp_path / "out", *settings)


def test_a_folder_that_is_packed(call, checkpoint, folder, tmp_path):
    packed = tmp_path / "packed"
    settings = [f"data.root={folder}", f"output_dir={packed}", "processes=0", "data.val_fraction=0"]
    status, _, errors = call(pack_main, *settings)
    assert status == 0 and not errors
    trained(call, checkpoint, tmp_path / "out", "data=streaming", f"data.url={packed}")


def test_a_part_of_a_run_is_noted(tmp_path):
    part = PartOfRun(1, 2, 0, 3, 6, "digest", {"pretrained": f"models/{LATIN}"})
    part.write(tmp_path)
    assert PartOfRun.read(tmp_path) == part


def test_a_bad_image_is_named(call, checkpoint, folder, tmp_path):
    (folder / f"{LATIN}-1.png").write_bytes(b"no image")
    status, _, errors = call(
        train_main, f"pretrained={checkpoint}", f"data.root={folder}", f"output_dir={tmp_path}/out"
    )
    assert status == 1 and "Traceback" not in errors and "unreadable" in errors and "-1.png" in errors
