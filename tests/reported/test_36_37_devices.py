"""Rows 2, 36 and 37 on two devices: what is logged, what is saved if one fails, and signals if one is gone."""

from __future__ import annotations

import csv
import json
import signal
import time
from functools import partial

import pytest
import torch

from benchmarks.forked import run, run_ranks, start_ranks
from tests.reported.drawing import numbered

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


def common(checkpoint, folder, out) -> list[str]:
    settings = [f"pretrained={checkpoint}", f"data.root={folder}", "resolution=32", f"output_dir={out}"]
    return [*settings, "validate_first=false", "trainer.log_every_n_steps=1", "callbacks=[checkpoint,timing]"]


def logged(out, name: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("batch", [1, 2])
def test_row_36_losses_do_not_depend_on_the_number_of_devices(checkpoint, tmp_path, batch):
    """Three images to validate on two devices: one of the four shares is a repeat."""
    folder, others = numbered(tmp_path / "photos", 8), numbered(tmp_path / "val", 3)
    settings = [f"data.val_root={others}", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    settings += ["model.optimizer.lr=1e-9", "objective.caption_dropout=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    run("train", *common(checkpoint, folder, one), *settings, f"data.batch_size={2 * batch}", log=tmp_path / "log")
    run_ranks("train", *common(checkpoint, folder, two), *settings, f"data.batch_size={batch}", log=tmp_path / "log")
    for name in ("val/loss", "train/loss"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-5), name


def timings(out) -> dict:
    return json.loads((out / "timings.json").read_text())


def test_row_36_timings_are_those_of_all_devices(checkpoint, tmp_path):
    """Two ranks with three and two of five images, and a training of which each step accumulates two batches."""
    predict = [f"pretrained={checkpoint}", 'prompt=["a","b","c","d","e"]', "steps=2", "batch_size=1"]
    run_ranks("predict", *predict, f"output_dir={tmp_path / 'images'}", log=tmp_path / "log")
    sampled = timings(tmp_path / "images")
    assert (sampled["images"], sampled["devices"]) == (5, 2)

    settings = ["data.val_fraction=0", "data.batch_size=1", "trainer.accumulate_grad_batches=2", "trainer.max_steps=5"]
    folder = numbered(tmp_path / "photos", 8)
    run_ranks("train", *common(checkpoint, folder, tmp_path / "out"), *settings, log=tmp_path / "log")
    trained = timings(tmp_path / "out")
    assert (trained["steps"], trained["warmup"]["steps"], trained["devices"]) == (5, 3, 2)


def fail_on_rank_1(step: int) -> None:
    """Make the loading of a batch fail in one process, once some steps are done."""
    import os

    from sdmodule.data.dataset import ImageFolderDataset
    from sdmodule.errors import SettingsError

    if os.environ["LOCAL_RANK"] != "1":
        return
    load, count = ImageFolderDataset.load, 0

    def patched(self, *arguments):
        nonlocal count
        count += 1
        if count > step:
            raise SettingsError("data: x.png cannot be decoded; replace or remove it.")
        return load(self, *arguments)

    ImageFolderDataset.load = patched


def test_row_2_a_device_that_fails_leaves_a_checkpoint(checkpoint, tmp_path):
    folder, out = numbered(tmp_path / "photos", 12), tmp_path / "out"
    settings = [*common(checkpoint, folder, out), "data.batch_size=1", "data.val_fraction=0", "trainer.max_steps=50"]
    first, second = start_ranks("train", *settings, log=tmp_path / "log", preparation=partial(fail_on_rank_1, 4))
    status, output = second.wait()
    assert status == 1 and "x.png cannot be decoded" in output
    first.process.kill()
    first.process.join()
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 2
    run("train", *settings, "data.batch_size=2", "ckpt_path=last", "trainer.max_steps=6", log=tmp_path / "log")


def impatient() -> None:
    import sdmodule.training.signal_guard as module

    module.PATIENCE = 2.0


def test_row_37_a_signal_ends_a_process_that_waits_for_one_that_is_stopped(checkpoint, tmp_path):
    folder, out = numbered(tmp_path / "photos", 12), tmp_path / "out"
    settings = [*common(checkpoint, folder, out), "data.batch_size=1", "data.val_fraction=0"]
    settings += ["trainer.max_steps=100000", "callbacks.checkpoint.every_n_train_steps=1"]
    first, second = start_ranks("train", *settings, log=tmp_path / "log", preparation=impatient)
    first.wait_until(lambda: (out / "checkpoints" / "last.ckpt").is_file())
    second.send(signal.SIGSTOP)  # gone, and its connections do not end
    time.sleep(1)
    start = time.monotonic()
    first.send(signal.SIGTERM)
    status, output = first.wait(30)
    second.process.kill()
    second.process.join()
    assert status == 143 and time.monotonic() - start < 15, output
