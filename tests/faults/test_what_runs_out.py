"""Signals, full disks, lack of memory, dying workers, bad images and NaN losses in the middle of a run."""

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
from omegaconf import OmegaConf

from benchmarks.forked import Command, run
from sdmodule.cli.error_messages import report_resource_errors
from sdmodule.errors import SettingsError
from sdmodule.training.checkpoint_io import is_intact
from tests.faults.conftest import write_scenes


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


GRACE = 30
"""Seconds that a cluster scheduler leaves between SIGTERM and SIGKILL."""


@pytest.fixture
def training(checkpoint, tmp_path):
    """The command line of a training on nine images, and its output folder."""
    photos = write_scenes(tmp_path / "photos", 9)
    out = tmp_path / "out"
    common = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={out}", "resolution=32"]
    common += ["data.batch_size=2", "data.val_fraction=0", "trainer.log_every_n_steps=1"]
    return common, out


SAVING = ["callbacks=[checkpoint]"]
"""At the default interval, which is longer than all of these trainings."""

AT_EVERY_STEP = ["callbacks.checkpoint.every_n_train_steps=1", "+callbacks.checkpoint.save_top_k=-1"]


def checkpoint_steps(out: Path) -> list[int]:
    """The steps of a run's checkpoints; asserts that every one is intact."""
    files = list((out / "checkpoints").glob("*.ckpt"))
    assert files and all(is_intact(file) for file in files) and not list(out.rglob("*.part"))
    return sorted(torch.load(file, weights_only=True)["global_step"] for file in files)


def wait_for(condition, command: Command) -> None:
    command.wait_until(condition)
    assert condition(), command.log.read_text()


def assert_error(status: int, output: str, *parts: str) -> None:
    """Status 1 and no traceback; the last line is an error message that has all of the parts."""
    assert status == 1 and "Traceback" not in output, output
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and not [part for part in parts if part not in last], output


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_long_validation_at_once(training, tmp_path, number, status):
    """Its sample images alone would take minutes."""
    settings, out = training
    settings = [setting for setting in settings if not setting.startswith("data.val_fraction")]
    settings += ["callbacks=[checkpoint,ema,samples]", "+steps=999", "callbacks.samples.prompts=[a,b,c,d]"]
    settings += ["callbacks.ema.start_step=1", "trainer.val_check_interval=2", "trainer.max_steps=4"]
    one = Command("train", *settings, log=tmp_path / "log")
    wait_for(lambda: "val" in one.log.read_text(), one)
    time.sleep(1)
    assert one.process.is_alive(), one.log.read_text()
    one.send(number)
    ended, output = one.wait(GRACE)
    assert ended == status and "resume with ckpt_path=" in output, output
    assert set(checkpoint_steps(out)) == {2}


def test_sigterm_while_a_cache_is_written(training, tmp_path):
    settings, _ = training
    write_scenes(tmp_path / "photos", 150)
    cache = tmp_path / "cache"
    settings += ["cache=latents", f"cache.folder={cache}", "trainer.max_steps=1", "resolution=128"]
    one = Command("train", *settings, log=tmp_path / "log")
    wait_for(lambda: "Encoding" in one.log.read_text() or cache.is_dir(), one)
    one.send(signal.SIGTERM)
    assert one.wait(GRACE)[0] == 143
    assert "broken" not in run("train", *settings, log=tmp_path / "log")


# ---------------------------------------------------------------------------------------------- disks


def limited_files(size: int) -> None:
    """Limit the size of each file that the process writes, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes, or resizes the one it has mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def make(size: int) -> Path:
        nonlocal mounted
        option = f"size={size}"
        command = ["mount", "-o", f"remount,{option}", place] if mounted else ["mount", "-t", "tmpfs", "-o", option]
        command += [] if mounted else ["none", place]
        if subprocess.run(list(map(str, command)), capture_output=True).returncode:
            pytest.skip("no permission to mount a file system")
        mounted = True
        return place

    yield make
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_training_on_a_full_disk_keeps_its_last_checkpoint_and_resumes(training, tmp_path, small_disk):
    settings, _ = training
    out = small_disk(200 * 2**20) / "out"
    settings += [*SAVING, f"output_dir={out}", "trainer.max_steps=6"]
    run("train", *settings, "trainer.max_steps=2", log=tmp_path / "log")
    used = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    disk = small_disk(used + 2**19)  # another checkpoint does not fit
    status, output = Command("train", *settings, "ckpt_path=last", log=tmp_path / "log").wait()
    assert_error(status, output, str(disk), "No space left", "ckpt_path=last")
    assert set(checkpoint_steps(out)) == {2}
    small_disk(200 * 2**20)
    run("train", *settings, "ckpt_path=last", log=tmp_path / "log")
    assert checkpoint_steps(out)[-1] == 6


def test_a_checkpoint_that_exceeds_the_quota_is_an_error(training, tmp_path):
    settings, out = training
    settings += SAVING
    run("train", *settings, "trainer.max_steps=2", log=tmp_path / "log")
    quota = partial(limited_files, 2**17)
    one = Command("train", *settings, "trainer.max_steps=4", "ckpt_path=last", log=tmp_path / "log", preparation=quota)
    assert_error(*one.wait(), "checkpoints/", "cannot be written", "ckpt_path=last")
    assert set(checkpoint_steps(out)) == {2}


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
    status, output = Command(*command, log=tmp_path / "log").wait()
    assert_error(status, output, str(place), "cannot be written")
    assert not list(disk.rglob("*.part"))
    if what == "export":
        assert not place.exists()
    small_disk(200 * 2**20)
    run(*command, *(["resume=true"] if what == "images" else []), log=tmp_path / "log")
    if what == "images":
        assert len(list((place / "images").glob("*.png"))) == 100


# ---------------------------------------------------------------------------------------------- memory


def limit_memory(more: int) -> None:
    """Let the process allocate at most that many more bytes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


def test_a_prediction_that_runs_out_of_memory_says_what_to_lower(checkpoint, tmp_path):
    settings = ["prompt=a", "num_images_per_prompt=8", "batch_size=8", "height=1024", "width=1024", "steps=1"]
    settings += [f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    little = partial(limit_memory, 2**29)
    one = Command("predict", *settings, log=tmp_path / "log", preparation=little)
    assert_error(*one.wait(), "batch_size=8 to 1, then precision=32-true to 16-true on a GPU, then height and width")


def test_a_training_that_runs_out_of_memory_says_what_to_lower(training, tmp_path):
    settings, _ = training
    settings += ["resolution=1024", "data.batch_size=8"]
    one = Command("train", *settings, log=tmp_path / "log", preparation=partial(limit_memory, 2**29))
    assert_error(*one.wait(), "data.batch_size=8 to 1", "cache=latents", "resolution=1024")


# ---------------------------------------------------------------------------------------------- data


def test_a_worker_that_loads_images_dies(training, tmp_path):
    settings, out = training
    settings += [*SAVING, "data.num_workers=2", "trainer.max_steps=100000"]
    one = Command("train", *settings, log=tmp_path / "log")
    metrics = out / "metrics.csv"
    wait_for(lambda: metrics.is_file() and any((out / "checkpoints").glob("*.ckpt")), one)  # some steps are done
    worker, *_ = psutil.Process(one.process.pid).children()
    worker.kill()
    assert_error(*one.wait(), "a data loading process died", "data.num_workers=1", "ckpt_path=last")
    step = checkpoint_steps(out)[-1]
    run("train", *settings, "ckpt_path=last", f"trainer.max_steps={step + 2}", log=tmp_path / "log")


# ---------------------------------------------------------------------------------------------- losses


def nan_loss_at(*steps: int) -> None:
    """Make the loss NaN at these steps."""
    from sdmodule.module import StableDiffusionModule

    training_step = StableDiffusionModule.training_step

    def patched(self, batch, batch_idx):
        loss = training_step(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step + 1 in steps else loss

    StableDiffusionModule.training_step = patched


def test_a_nan_loss_stops_the_training_before_the_weights_change(training, tmp_path):
    settings, out = training
    settings += [*SAVING, "trainer.max_steps=6", "trainer.accumulate_grad_batches=2"]
    one = Command("train", *settings, log=tmp_path / "log", preparation=partial(nan_loss_at, 4))
    assert_error(*one.wait(), "loss is NaN or inf at step 4", "trainer.nan_loss=skip", "model.optimizer.lr")
    assert checkpoint_steps(out)[-1] == 3
    run("train", *settings, "ckpt_path=last", log=tmp_path / "log")
    assert checkpoint_steps(out)[-1] == 6


def test_a_step_with_a_nan_loss_is_skipped_and_counted(training, tmp_path):
    settings, out = training
    settings += ["trainer.nan_loss=skip", *SAVING, *AT_EVERY_STEP]
    one = Command(
        "train", *settings, "trainer.max_steps=6", log=tmp_path / "log", preparation=partial(nan_loss_at, 3, 5)
    )
    status, output = one.wait()
    assert status == 0 and output.count("; step skipped, ") == 2, output

    def weights(step: int) -> dict[str, torch.Tensor]:
        return torch.load(out / "checkpoints" / f"step={step}.ckpt", weights_only=True)["state_dict"]

    steps = [weights(step) for step in range(1, 7)]
    same = [all(torch.equal(v, after[name]) for name, v in before.items()) for before, after in pairwise(steps)]
    assert same == [False, True, False, True, False]
    assert "train/skipped" in (out / "metrics.csv").read_text()


def test_too_many_skipped_steps_stop_a_training(training, tmp_path):
    settings, _ = training
    settings += ["trainer.nan_loss=skip", "trainer.max_steps=1000", "callbacks=[]"]
    one = Command("train", *settings, log=tmp_path / "log", preparation=partial(nan_loss_at, *range(2, 1000)))
    assert_error(*one.wait(), "50 steps in a row, up to 51")


def test_the_death_of_a_worker_is_told_whatever_it_interrupts():
    """torch raises it from a signal handler; `inspect`, say, makes another error of what is raised within it."""
    with pytest.raises(SettingsError, match=r"a data loading process died.*data.num_workers=2"):
        with report_resource_errors(OmegaConf.create({"data": {"num_workers": 4}})):
            try:
                raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")
            except RuntimeError as error:
                raise TypeError("unsupported callable") from error


def test_an_error_that_is_its_own_cause_ends_the_command():
    error = TypeError("odd")
    error.__cause__ = ValueError("odd")
    error.__cause__.__cause__ = error
    with pytest.raises(TypeError), report_resource_errors(OmegaConf.create({})):
        raise error
