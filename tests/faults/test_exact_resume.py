"""A training that is interrupted, however often and however hard, ends equal to the bit to one that never was."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.forked import Command, run, start_ranks


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


ROOT = Path(__file__).parents[2]
STEPS = 8

# what is trained, as settings of the command
KINDS = {
    "full": ["tuning.text_encoder=true", "tuning.text_encoder_stop=5"],
    "lora": ["tuning=lora", "tuning.dropout=0.2"],
    "textual_inversion": [
        "tuning=textual_inversion",
        "tuning.placeholder=<cat>",
        "tuning.initializer=star",
        "data.template='<cat>, {}'",
    ],
    "controlnet": ["tuning=controlnet"],
    "inpainting": ["model=inpaint", "training.inpaint.convert=true"],
    "autoencoder": ["model=autoencoder", "callbacks=[checkpoint,export]"],
}
# how it is trained; an epoch has 14 images, so its last step accumulates fewer batches than the others
WAYS = {
    "read": [
        "data.center_crop=false",
        "data.random_flip=true",
        "data.shuffle_tags=true",
        "data.num_workers=1",
        "trainer.accumulate_grad_batches=2",
        "trainer.val_check_interval=5",
    ],
    "cached": [
        "data.buckets=true",
        "data.random_flip=true",
        "trainer.accumulate_grad_batches=2",
        "trainer.val_check_interval=3",
    ],
}
# each kind in one of the ways
VARIANTS = [("full", "cached"), ("lora", "read"), ("textual_inversion", "read")]
VARIANTS += [("controlnet", "cached"), ("inpainting", "read"), ("autoencoder", "read")]
SCHEDULE = "model.lr_scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 3, gamma: 0.7}"


OFTEN = "callbacks.checkpoint.every_n_train_steps=3"
"""Leaves something to resume from after SIGKILL; at the default interval, a signal that can be handled still does."""


def settings(checkpoint: Path, scene_photos: Path, kind: str, way: str, out: Path) -> list[str]:
    """The command line of a training that logs every step."""
    common = [f"pretrained={checkpoint}", f"data.root={scene_photos}", "resolution=32", "data.batch_size=2"]
    common += [f"output_dir={out}", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "+steps=1", SCHEDULE]
    common += ["callbacks=[checkpoint,ema,samples,export]", OFTEN]
    if kind != "autoencoder":
        common += ["callbacks.ema.start_step=3", "objective.caption_dropout=0.4"]
    common += [*KINDS[kind], *WAYS[way]]
    if way == "cached" and kind != "autoencoder":  # embeddings of a text encoder that is trained cannot be cached
        cache = "latents" if kind in ("full", "textual_inversion") else "all"
        common += [f"cache={cache}", f"cache.folder={out.parent / 'cache'}"]
    return common


def flat(value: object, name: str = "") -> dict[str, object]:
    """Tensors and numbers of a checkpoint by their path in it."""
    if isinstance(value, dict):
        return {key: item for part, inner in value.items() for key, item in flat(inner, f"{name}/{part}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def ending(out: Path) -> dict[str, object]:
    """All that a training leaves: weights, optimizer, learning rate schedule, EMA, export and samples."""
    newest = max((out / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    content = torch.load(newest, weights_only=True)
    kept = {name: content[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    kept["ema"] = content["callbacks"].get("EMA", {})
    loops = content["loops"]["fit_loop"]
    kept["progress"] = [
        loops[name] for name in ("epoch_loop.batch_progress", "epoch_loop.state_dict", "epoch_progress")
    ]
    for file in (out / "export").rglob("*.safetensors"):
        kept[str(file.relative_to(out))] = load_file(file)
    for file in (out / "export").rglob("*.json"):
        kept[str(file.relative_to(out))] = file.read_text()
    for file in (out / "samples").glob("*.png"):
        kept[str(file.relative_to(out))] = file.read_bytes()
    return flat(kept)


def logged(out: Path) -> dict[tuple[str, str], set[str]]:
    """Every value that was logged, by step and name, over all parts of a training."""
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for file in out.glob("metrics*.csv"):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch") and name.startswith(("train/", "val/")):
                        values[row["step"], name].add(value)
    return values


def assert_same(out: Path, straight: Path) -> None:
    ours, theirs = ending(out), ending(straight)
    assert ours.keys() == theirs.keys()
    differing = [
        name
        for name, value in theirs.items()
        if not (torch.equal(value, ours[name]) if isinstance(value, torch.Tensor) else value == ours[name])
    ]
    assert not differing
    assert logged(out) == logged(straight)
    assert not list(out.rglob("*.part"))


def newest_step(out: Path) -> int:
    names = [file.stem for file in (out / "checkpoints").glob("step=*.ckpt")]
    return max((int(name.partition("=")[2].partition("-")[0]) for name in names), default=0)


def parts_of(out: Path) -> int:
    """How often the training was started; each time writes its own metrics."""
    return len(list(out.glob("metrics*.csv")))


def steps_logged(out: Path) -> int:
    """Steps of the part that is running now."""
    file = out / "metrics.csv"
    return len(set(csv_steps(file.read_text()))) if file.is_file() else 0


def csv_steps(text: str) -> Iterator[str]:
    return (row["step"] for row in csv.DictReader(text.splitlines()) if row.get("train/loss"))


@pytest.fixture(scope="module")
def straight(checkpoint, scene_photos, tmp_path_factory):
    """The folder of a training that is never interrupted, for each kind and way."""
    trained: dict[tuple[str, str], Path] = {}

    def of(kind: str, way: str) -> Path:
        if (kind, way) not in trained:
            out = tmp_path_factory.mktemp("straight") / "out"
            run("train", *settings(checkpoint, scene_photos, kind, way, out), log=out.parent / "log")
            trained[kind, way] = out
        return trained[kind, way]

    return of


def resuming(out: Path) -> list[str]:
    return ["ckpt_path=last"] if list((out / "checkpoints").glob("*.ckpt")) else []


@pytest.mark.parametrize(("kind", "way"), VARIANTS)
def test_a_training_killed_again_and_again_ends_like_an_uninterrupted_one(
    checkpoint, scene_photos, straight, tmp_path, kind, way
):
    out, log = tmp_path / "out", tmp_path / "log"
    common = settings(checkpoint, scene_photos, kind, way, out)
    seldom = [setting for setting in common if setting != OFTEN]
    rng = random.Random(f"{kind} {way}")
    killed = 0
    for number in (signal.SIGKILL, signal.SIGINT if way == "read" else signal.SIGTERM):
        hard = number == signal.SIGKILL
        before, needed = parts_of(out), 0 if hard else rng.choice([1, 2])
        one = Command("train", *(common if hard else seldom), *resuming(out), log=log)
        one.wait_until(
            lambda before=before, needed=needed: (
                parts_of(out) > before and steps_logged(out) >= needed and newest_step(out) > 0
            )
        )
        one.process.join(rng.random() * 0.15)
        if one.process.is_alive():
            one.send(number)
        status, output = one.wait(60)
        assert status in (0, 128 + number), output
        killed += status != 0
    last = run("train", *common, *resuming(out), log=log)
    assert "broken" not in last
    assert killed == 2
    assert_same(out, straight(kind, way))


def test_two_processes_that_are_interrupted_end_like_uninterrupted_ones(checkpoint, scene_photos, tmp_path):
    def command(out: Path) -> list[str]:
        return [*settings(checkpoint, scene_photos, "full", "cached", out), "data.batch_size=1"]

    out, log = tmp_path / "interrupted" / "out", tmp_path / "log"
    straight = start_ranks("train", *command(tmp_path / "straight" / "out"), log=tmp_path / "straight-log")

    # the way a shell starts it and Ctrl-C ends it: Lightning starts the second process, and both get the signal
    program = [sys.executable, str(ROOT / "train.py"), *command(out), "trainer.devices=2", "trainer.strategy=ddp"]
    with log.open("w") as file:
        one = subprocess.Popen(program, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        while one.poll() is None and newest_step(out) == 0:
            time.sleep(0.01)
        os.killpg(one.pid, signal.SIGTERM)
        assert one.wait(120) == 143, log.read_text()

    for rank in [*start_ranks("train", *command(out), "ckpt_path=last", log=log), *straight]:
        status, output = rank.wait()
        assert status == 0, output
    assert_same(out, tmp_path / "straight" / "out")


def test_a_validation_that_was_repeated_does_not_count_as_the_next_one(checkpoint, scene_photos, tmp_path):
    """Interrupted in the validation of step 3, and again after it."""
    out, log = tmp_path / "out", tmp_path / "log"
    common = [f"pretrained={checkpoint}", f"data.root={scene_photos}", "resolution=32", "data.batch_size=2"]
    common += [f"output_dir={out}", "trainer.max_steps=5", "trainer.val_check_interval=3"]
    common += ["callbacks=[checkpoint,samples,export]", "callbacks.checkpoint.every_n_train_steps=1"]
    in_validation = Command("train", *common, "+steps=900", log=log)
    in_validation.wait_until(lambda: newest_step(out) >= 3)
    time.sleep(0.3)
    in_validation.send(signal.SIGTERM)
    assert in_validation.wait()[0] == 143 and not list(out.glob("samples/*"))
    after = Command("train", *common, "+steps=1", "ckpt_path=last", log=log)
    assert after.kill(lambda: newest_step(out) == 4)
    run("train", *common, "+steps=1", "ckpt_path=last", log=log)
    files = out.glob("checkpoints/*.ckpt")
    assert max(torch.load(file, weights_only=True)["global_step"] for file in files) == 5
