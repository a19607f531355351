"""Signals, disks, memory, processes and images that fail in the middle of a run."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.forked import Command, run
from sdmodule.training.checkpoint_io import is_intact
from tests.faults.conftest import scenes

GRACE = 30
"""Seconds that a scheduler gives between SIGTERM and SIGKILL."""


@pytest.fixture
def training(checkpoint, tmp_path):
    """The arguments of a training on nine images, and its folder."""
    photos = scenes(tmp_path / "photos", 9)
    out = tmp_path / "out"
    common = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={out}", "resolution=32"]
    common += ["data.batch_size=2", "data.val_fraction=0", "trainer.log_every_n_steps=1"]
    return common, out


SAVING = ["callbacks=[checkpoint]", "callbacks.checkpoint.every_n_train_steps=1"]


def whole_steps(out: Path) -> list[int]:
    """The steps of the checkpoints of a run, all of which are whole."""
    files = list((out / "checkpoints").glob("*.ckpt"))
    assert files and all(is_intact(file) for file in files) and not list(out.rglob("*.part"))
    return sorted(torch.load(file, weights_only=True)["global_step"] for file in files)


def wait_for(condition, command: Command) -> None:
    while not condition():
        assert command.process.is_alive(), command.said.read_text()
        time.sleep(0.01)


def one_sentence(status: int, words: str, *parts: str) -> None:
    """Status 1 and one sentence, the last line, that has all of the parts."""
    assert status == 1 and "Traceback" not in words, words
    last = words.splitlines()[-1]
    assert last.startswith("error: ") and not [part for part in parts if part not in last], words


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_long_validation_is_heard_at_once(training, tmp_path, number, status):
    """Its images alone would take minutes."""
    settings, out = training
    settings = [setting for setting in settings if not setting.startswith("data.val_fraction")]
    settings += [SAVING[1], "callbacks=[checkpoint,ema,samples]", "+steps=999", "callbacks.samples.prompts=[a,b,c,d]"]
    settings += ["callbacks.ema.start_step=1", "trainer.val_check_interval=2", "trainer.max_steps=4"]
    one = Command("train", *settings, said=tmp_path / "said")
    wait_for(lambda: (out / "checkpoints" / "step=2.ckpt").is_file(), one)
    time.sleep(1)
    assert one.process.is_alive(), one.said.read_text()
    one.send(number)
    ended, words = one.ended(GRACE)
    assert ended == status and "resume with ckpt_path=" in words, words
    assert set(whole_steps(out)) == {2}


def test_sigterm_while_images_are_cached(training, tmp_path):
    settings, _ = training
    scenes(tmp_path / "photos", 300)
    cache = tmp_path / "cache"
    settings += ["cache=latents", f"cache.folder={cache}", "trainer.max_steps=1", "resolution=128"]
    one = Command("train", *settings, said=tmp_path / "said")
    wait_for(lambda: "Encoding" in one.said.read_text() or cache.is_dir(), one)
    one.send(signal.SIGTERM)
    assert one.ended(GRACE)[0] == 143
    assert "broken" not in run("train", *settings, said=tmp_path / "said")


# ---------------------------------------------------------------------------------------------- disks


def limited_files(size: int) -> None:
    """Let no file of the process be longer, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of so many bytes, or changes the size of the one that it made."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def make(size: int) -> Path:
        nonlocal mounted
        option = f"size={size}"
        command = ["mount", "-o", f"remount,{option}", place] if mounted else ["mount", "-t", "tmpfs", "-o", option]
        command += [] if mounted else ["none", place]
        if subprocess.run(list(map(str, command)), capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount a file system")
        mounted = True
        return place

    yield make
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_training_on_a_full_disk_leaves_its_last_checkpoint_and_goes_on(training, tmp_path, small_disk):
    settings, _ = training
    out = small_disk(200 * 2**20) / "out"
    settings += [*SAVING, f"output_dir={out}", "trainer.max_steps=6"]
    run("train", *settings, "trainer.max_steps=2", said=tmp_path / "said")
    full = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    one = small_disk(full + 2**19)  # another checkpoint does not fit
    status, words = Command("train", *settings, "ckpt_path=last", said=tmp_path / "said").ended()
    one_sentence(status, words, str(one), "No space left", "ckpt_path=last")
    assert set(whole_steps(out)) == {2}
    small_disk(200 * 2**20)
    run("train", *settings, "ckpt_path=last", said=tmp_path / "said")
    assert whole_steps(out)[-1] == 6


def test_a_checkpoint_too_large_for_the_quota_is_told_of(training, tmp_path):
    settings, out = training
    settings += SAVING
    run("train", *settings, "trainer.max_steps=2", said=tmp_path / "said")
    few = partial(limited_files, 2**17)
    one = Command("train", *settings, "trainer.max_steps=4", "ckpt_path=last", said=tmp_path / "said", preparation=few)
    one_sentence(*one.ended(), "checkpoints/", "cannot be written", "ckpt_path=last")
    assert set(whole_steps(out)) == {2}


@pytest.mark.parametrize("what", ["images", "export", "cache"])
def test_other_files_on_a_full_disk(checkpoint, training, tmp_path, small_disk, what):
    settings, _ = training
    disk = small_disk(2**17)
    place = disk / what
    predict = ["prompt=a", "num_images_per_prompt=100", "batch_size=2", "steps=1", f"pretrained={checkpoint}"]
    command = {
        "images": ["predict", *predict, f"output_dir={place}"],
        "export": ["train", *settings, "callbacks=[export]", f"callbacks.export.folder={place}", "trainer.max_steps=1"],
        "cache": [
            "train",
            *settings,
            "cache=latents",
            f"cache.folder={place}",
            "trainer.max_steps=1",
            "resolution=128",
        ],
    }[what]
    if what == "cache":
        (disk / "filler").write_bytes(bytes(2**16 + 2**15))
    status, words = Command(*command, said=tmp_path / "said").ended()
    one_sentence(status, words, str(place), "cannot be written")
    assert not list(disk.rglob("*.part"))
    if what == "export":
        assert not place.exists()
    small_disk(200 * 2**20)
    run(*command, *(["resume=true"] if what == "images" else []), said=tmp_path / "said")
    if what == "images":
        assert len(list((place / "images").glob("*.png"))) == 100


# ---------------------------------------------------------------------------------------------- memory


def little_memory(more: int) -> None:
    """Let the process take that much more memory than it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + more, has + more))


def test_a_prediction_out_of_memory_says_what_to_lower(checkpoint, tmp_path):
    settings = ["prompt=a", "num_images_per_prompt=8", "batch_size=8", "height=1024", "width=1024", "steps=1"]
    settings += [f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    few = partial(little_memory, 2**29)
    one = Command("predict", *settings, said=tmp_path / "said", preparation=few)
    one_sentence(*one.ended(), "batch_size=8 to 1, then precision=32-true to 16-mixed on a GPU, then height and width")


def test_a_training_out_of_memory_says_what_to_lower(training, tmp_path):
    settings, _ = training
    settings += ["resolution=1024", "data.batch_size=8"]
    one = Command("train", *settings, said=tmp_path / "said", preparation=partial(little_memory, 2**29))
    one_sentence(*one.ended(), "data.batch_size=8 to 1", "cache=latents", "resolution=1024")


# ---------------------------------------------------------------------------------------------- data


def test_a_process_that_loads_images_dies(training, tmp_path):
    settings, out = training
    settings += [*SAVING, "data.num_workers=2", "trainer.max_steps=100000"]
    one = Command("train", *settings, said=tmp_path / "said")
    wait_for(lambda: (out / "checkpoints" / "last.ckpt").is_file(), one)
    worker, *_ = psutil.Process(one.process.pid).children()
    worker.kill()
    one_sentence(*one.ended(), "a process that reads images died", "data.num_workers=1", "ckpt_path=last")
    step = whole_steps(out)[-1]
    run("train", *settings, "ckpt_path=last", f"trainer.max_steps={step + 2}", said=tmp_path / "said")


def test_an_image_turns_unreadable_in_the_middle_of_a_training(training, tmp_path):
    settings, out = training
    settings += [*SAVING, "data.num_workers=1", "data.random_flip=true"]
    run("train", *settings, "trainer.max_steps=40", f"output_dir={tmp_path / 'straight'}", said=tmp_path / "said")
    one = Command("train", *settings, "trainer.max_steps=100000", said=tmp_path / "said")
    wait_for(lambda: (out / "checkpoints" / "last.ckpt").is_file(), one)
    image = tmp_path / "photos" / "003.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    one_sentence(*one.ended(), str(image), "replace or remove it")
    image.write_bytes(content)
    step = whole_steps(out)[-1]
    run("train", *settings, "ckpt_path=last", f"trainer.max_steps={max(step + 2, 40)}", said=tmp_path / "said")
    if step <= 38:
        ours, theirs = (
            torch.load(place / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            for place in (out, tmp_path / "straight")
        )
        assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


# ---------------------------------------------------------------------------------------------- numbers


def bad_at(*steps: int) -> None:
    """Make the loss of these steps NaN."""
    from sdmodule.module import StableDiffusionModule

    honest = StableDiffusionModule.training_step

    def step(self, batch, batch_idx):
        loss = honest(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step + 1 in steps else loss

    StableDiffusionModule.training_step = step


def test_a_nan_loss_stops_before_it_reaches_the_weights(training, tmp_path):
    settings, out = training
    settings += [*SAVING, "trainer.max_steps=6", "trainer.accumulate_grad_batches=2"]
    one = Command("train", *settings, said=tmp_path / "said", preparation=partial(bad_at, 4))
    one_sentence(*one.ended(), "loss is NaN or inf at step 4", "trainer.nan_loss=skip", "model.optimizer.lr")
    assert whole_steps(out)[-1] == 3
    run("train", *settings, "ckpt_path=last", said=tmp_path / "said")
    assert whole_steps(out)[-1] == 6


def test_a_step_with_a_nan_loss_is_skipped_and_counted(training, tmp_path):
    settings, out = training
    settings += ["trainer.nan_loss=skip", *SAVING, "+callbacks.checkpoint.save_top_k=-1"]
    one = Command("train", *settings, "trainer.max_steps=6", said=tmp_path / "said", preparation=partial(bad_at, 3, 5))
    status, words = one.ended()
    assert status == 0 and words.count("; step skipped, ") == 2, words

    def weights(step: int) -> dict[str, torch.Tensor]:
        return torch.load(out / "checkpoints" / f"step={step}.ckpt", weights_only=True)["state_dict"]

    steps = [weights(step) for step in range(1, 7)]
    same = [all(torch.equal(v, after[name]) for name, v in before.items()) for before, after in pairwise(steps)]
    assert same == [False, True, False, True, False]
    assert "train/skipped" in (out / "metrics.csv").read_text()


def test_fifty_skipped_steps_in_a_row_stop_the_training(training, tmp_path):
    settings, _ = training
    settings += ["trainer.nan_loss=skip", "trainer.max_steps=1000", "callbacks=[]"]
    one = Command("train", *settings, said=tmp_path / "said", preparation=partial(bad_at, *range(2, 1000)))
    one_sentence(*one.ended(), "50 steps in a row, up to 51")
