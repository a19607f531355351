"""Row 2: whatever ends a training, a checkpoint of its last whole step is left, and it resumes to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sdmodule.cli.main import train_main
from tests.reported.drawing import metadata, numbered, shard, strokes

STEPS = 21

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


VANISH = "+callbacks.vanish={{_target_: tests.reported.watching.Vanish, file: {}, step: 3, cut: {}}}"


@pytest.fixture
def folder(tmp_path):
    return numbered(tmp_path / "photos", 10)


def train(call, checkpoint, out: Path, *settings: object) -> tuple[int, str, str]:
    """At the default interval between checkpoints, which is longer than the training."""
    common = [f"pretrained={checkpoint}", "resolution=32", "data.batch_size=1", "data.val_fraction=0"]
    common += ["callbacks=[checkpoint,ema]", "callbacks.ema.start_step=2", f"trainer.max_steps={STEPS}"]
    return call(train_main, *common, f"output_dir={out}", *settings)


def last(out: Path) -> dict:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


def assert_resumes_to_the_bit(call, checkpoint, out: Path, *settings: object) -> None:
    """Resumed, the training ends like one that was never interrupted."""
    status, printed, errors = train(call, checkpoint, out, "ckpt_path=last", *settings)
    assert status == 0, printed + errors
    straight = out.with_name("straight")
    assert train(call, checkpoint, straight, *settings)[0] == 0
    ours, theirs = last(out), last(straight)
    assert ours["global_step"] == theirs["global_step"] >= 8
    for name in ("state_dict", "optimizer_states"):
        assert equal(ours[name], theirs[name])
    assert equal(ours["callbacks"]["EMA"], theirs["callbacks"]["EMA"])


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("cut", "settings"),
    [(True, ["trainer.accumulate_grad_batches=3", "trainer.max_steps=8"]), (False, ["data.num_workers=2"])],
)
def test_an_image_that_becomes_unreadable(call, checkpoint, folder, tmp_path, cut, settings):
    file, out = folder / "p7.png", tmp_path / "out"
    content = file.read_bytes()
    status, _, errors = train(call, checkpoint, out, f"data.root={folder}", VANISH.format(file, cut), *settings)
    assert status == 1 and "Traceback" not in errors and str(file) in errors, errors
    assert last(out)["global_step"] >= 2
    file.write_bytes(content)
    assert_resumes_to_the_bit(call, checkpoint, out, f"data.root={folder}", *settings)


def test_a_mask_that_becomes_unreadable(call, checkpoint, folder, tmp_path):
    for file in folder.glob("*.txt"):
        file.unlink()
    for k in range(10):
        strokes((0, 0, 0), (255, 255, 255)).save(tmp_path / "photos" / f"mask{k}.png")
    rows = [{"file_name": f"p{k}.png", "text": f"p{k}", "mask_file_name": f"mask{k}.png"} for k in range(10)]
    metadata(folder, rows)
    settings = [f"data.root={folder}", "objective.masked=true"]
    out = tmp_path / "out"
    status, _, errors = train(call, checkpoint, out, *settings, VANISH.format(folder / "mask7.png", True))
    assert status == 1 and "mask7.png" in errors
    assert last(out)["global_step"] >= 2


def test_a_shard_that_is_cut(call, checkpoint, tmp_path):
    file, out = shard(tmp_path / "0.tar", *(f"p{k}" for k in range(10))), tmp_path / "out"
    whole = shutil.copy(file, tmp_path / "copy.tar")
    settings = ["data=webdataset", f"data.shards={file}"]
    status, _, errors = train(call, checkpoint, out, *settings, VANISH.format(file, True))
    assert status == 1 and "Traceback" not in errors and "0.tar" in errors
    shutil.copy(whole, file)
    assert_resumes_to_the_bit(call, checkpoint, out, *settings)


def test_an_error_that_nobody_expects(call, checkpoint, folder, tmp_path):
    fail = "+callbacks.fail={_target_: tests.reported.watching.FailAt, step: 5}"
    out = tmp_path / "out"
    status, _, errors = train(call, checkpoint, out, f"data.root={folder}", fail)
    assert status != 0 and "an unexpected failure" in errors
    assert last(out)["global_step"] == 5


def test_a_failure_before_the_first_step_leaves_no_checkpoint(call, checkpoint, folder, tmp_path):
    fail = "+callbacks.fail={_target_: tests.reported.watching.FailAt, step: 0}"
    assert train(call, checkpoint, tmp_path / "out", f"data.root={folder}", fail)[0] != 0
    assert not (tmp_path / "out" / "checkpoints").exists()
