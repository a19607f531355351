"""Progress of a run: a bar in a terminal, lines in a file."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
from contextlib import contextmanager
from pathlib import Path

import pytest
from lightning import Trainer
from torch.utils.data import DataLoader

from benchmarks.forked import Command
from sdmodule.callbacks.progress import ProgressBar
from sdmodule.cli.main import predict_main, train_main


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@contextmanager
def terminal():
    """A terminal of 24 lines and 160 columns: the path that a command writes to, and a function that reads from it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))

    def read(running):
        drawn = b""
        while select.select([ours], [], [], 0.1)[0] or running():
            if select.select([ours], [], [], 0)[0]:
                drawn += os.read(ours, 4096)
        return drawn.decode(errors="replace")

    try:
        yield Path(os.ttyname(theirs)), read
    finally:
        os.close(ours)
        os.close(theirs)


def assert_one_line_and_honest_times(drawn):
    """Nothing but the bar is drawn, nowhere but in its line; no time is 00:00 while something is left."""
    assert "Loading weights" not in drawn and "\x1b[A" not in drawn, drawn
    states = re.findall(r"(\d+)/(\d+) \|[^|]*\| [\d:]+, ([\d:?]+) left", drawn)
    assert states and all(left != "00:00" or done == total for done, total, left in states), states


@pytest.mark.slow
def test_predict_shows_one_bar_of_images_with_the_step(checkpoint, tmp_path):
    settings = [
        'prompt=["a","b","c"]',
        "batch_size=2",
        "steps=60",
        f"pretrained={checkpoint}",
        f"output_dir={tmp_path}/out",
    ]
    with terminal() as (path, read):
        one = Command("predict", *settings, "height=64", "width=64", log=tmp_path / "log", errors=path)
        drawn = read(one.process.is_alive)
    assert one.wait()[0] == 0, drawn
    assert "sampling: 0/3" in drawn and "sampling: 2/3" in drawn and "sampling: 3/3" in drawn
    assert re.search(r"step=\d+/60", drawn) and "denoising" not in drawn, "and no second bar"
    assert_one_line_and_honest_times(drawn)


@pytest.mark.slow
def test_train_shows_one_bar(checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", "resolution=32", "trainer.max_steps=4", "+steps=1"]
    settings += ["data.batch_size=2", "trainer.accumulate_grad_batches=3"]
    with terminal() as (path, read):
        one = Command("train", *settings, f"output_dir={tmp_path}/out", log=tmp_path / "log", errors=path)
        drawn = read(one.process.is_alive)
    assert one.wait()[0] == 0, drawn
    figures = r"training: 4/4 .*00:00 left, epoch=4/4, loss=[\d.]+, samples/s=[\d.]+, data wait=\d+%"
    assert re.search(figures, drawn), drawn
    assert "validating: 1/1" in drawn and "denoising: 1/1" in drawn
    assert_one_line_and_honest_times(drawn)


def test_without_a_terminal_progress_is_lines(call, checkpoint, photos, tmp_path):
    common = [f"pretrained={checkpoint}", "callbacks.progress.every=0"]
    settings = ['prompt=["a","b"]', "batch_size=1", "steps=2", f"output_dir={tmp_path}/out", *common]
    status, printed, complaint = call(predict_main, *settings)
    assert (status, complaint) == (0, "")
    lines = (
        r"sampling: 0 of 2 images, step 1/2, [\d:]+ left\n.*sampling: 1 of 2 images, step 2/2, decoding, [\d:]+ left\n"
    )
    assert re.search(lines, printed, re.DOTALL) and "sampling: 2 of 2 images, 00:00 left\n" in printed
    settings = [f"data.root={photos}", "resolution=32", "trainer.max_steps=3", f"output_dir={tmp_path}/train", *common]
    status, printed, complaint = call(train_main, *settings, "callbacks=[timing,progress]")
    assert (status, complaint) == (0, "")
    assert re.search(r"training: 3 of 3 steps, loss [\d.]+, samples/s [\d.]+, data wait \d+%, 00:00 left\n", printed)
    assert "validating: 1 of 1 batches, 00:00 left\n" in printed and "\r" not in printed


def test_progress_false_shows_nothing(call, checkpoint, tmp_path):
    settings = ["prompt=a", "steps=1", f"pretrained={checkpoint}", f"output_dir={tmp_path}/out", "progress=false"]
    printed = call(predict_main, *settings, "callbacks.progress.every=0")[1]
    assert [line.split()[0] for line in printed.splitlines()] == ["On", "Sampled", "Wrote"]


def test_a_resumed_sampling_counts_the_images_that_are_there(call, checkpoint, tmp_path):
    settings = ['prompt=["a","b","c","d"]', "batch_size=2", "steps=1", f"pretrained={checkpoint}"]
    settings += [f"output_dir={tmp_path}/out", "callbacks.progress.every=0"]
    assert call(predict_main, *settings)[0] == 0
    (tmp_path / "out" / "images" / "00002-2.png").unlink()
    printed = call(predict_main, *settings, "resume=true")[1]
    assert re.findall(r"sampling: (\d) of (\d) images", printed) == [("3", "4"), ("4", "4")]


def test_plain_prompts_of_any_trainer_are_counted(module, capsys):
    trainer = Trainer(logger=False, accelerator="cpu", callbacks=[ProgressBar(every=0)])
    module.sampling = module.sampling.updated(steps=1)
    trainer.predict(module, DataLoader(["a red circle", "a blue star"], batch_size=1), return_predictions=False)
    told = re.findall(r"sampling: (\d) of 2 images", capsys.readouterr().out)
    assert told == ["0", "1", "1", "2"]


def test_an_epoch_is_told_with_their_number(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", "resolution=32", "trainer.max_epochs=2", f"output_dir={tmp_path}/train"]
    settings += [f"pretrained={checkpoint}", "data.batch_size=2", "callbacks=[progress]", "callbacks.progress.every=0"]
    printed = call(train_main, *settings)[1]
    assert re.findall(r"training: (\d) of (\d) steps, epoch (\d/\d)", printed)[-1] == ("4", "4", "2/2")
    assert "training: 1 of 4 steps, epoch 1/2" in printed and "for 4 steps" in printed


def test_caching_has_a_total_and_an_end(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", "resolution=32", "trainer.max_steps=1", f"output_dir={tmp_path}/train"]
    settings += [f"pretrained={checkpoint}", "callbacks=[]", "cache=all", f"cache.folder={tmp_path}/cache"]
    printed = call(train_main, *settings)[1]
    for what, count in (("images", 5), ("captions", 6)):
        assert re.search(rf"Encoding {what} into \S+: {count}\n", printed)
        assert re.search(rf"Encoding {what} into \S+: {count} of {count}\n", printed)
