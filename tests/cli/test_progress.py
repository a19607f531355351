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

from benchmarks.forked import Command
from sdmodule.cli.main import predict_main, train_main


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


@pytest.mark.slow
def test_train_shows_one_bar(checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", "resolution=32", "trainer.max_steps=4", "+steps=1"]
    with terminal() as (path, read):
        one = Command("train", *settings, f"output_dir={tmp_path}/out", log=tmp_path / "log", errors=path)
        drawn = read(one.process.is_alive)
    assert one.wait()[0] == 0, drawn
    assert re.search(r"training: 4/4 .*left, loss=[\d.]+, samples/s=[\d.]+, data wait=\d+%", drawn), drawn


def test_without_a_terminal_progress_is_lines(call, checkpoint, photos, tmp_path):
    common = [f"pretrained={checkpoint}", "callbacks.progress.every=0"]
    settings = ['prompt=["a","b"]', "batch_size=1", "steps=2", f"output_dir={tmp_path}/out", *common]
    status, printed, complaint = call(predict_main, *settings)
    assert (status, complaint) == (0, "")
    assert "sampling: 0 of 2 images, step 1/2, ? left\n" in printed and "sampling: 1 of 2 images, step 2/2, " in printed
    settings = [f"data.root={photos}", "resolution=32", "trainer.max_steps=3", f"output_dir={tmp_path}/train", *common]
    status, printed, complaint = call(train_main, *settings, "callbacks=[timing,progress]")
    assert (status, complaint) == (0, "")
    assert re.search(r"training: 3 of 3 steps, loss [\d.]+, samples/s [\d.]+, data wait \d+%, 00:00 left\n", printed)
    assert "\r" not in printed


def test_progress_false_shows_nothing(call, checkpoint, tmp_path):
    settings = ["prompt=a", "steps=1", f"pretrained={checkpoint}", f"output_dir={tmp_path}/out", "progress=false"]
    assert call(predict_main, *settings, "callbacks.progress.every=0")[1] == f"Wrote {tmp_path}/out/grid.png\n"
