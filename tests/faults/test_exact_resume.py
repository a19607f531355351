"""A training that is stopped, however often and however hard, ends where one that never was does: to the bit."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.forked import Command, run

ROOT = Path(__file__).parents[2]
STEPS = 13

# what is trained: a line of settings of the command
KINDS = {
    "full": ["tuning.text_encoder=true", "tuning.text_encoder_stop=8"],
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
# how: an epoch is of 14 images, so that its last step has fewer batches than the others
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
        "cache=all",
        "data.buckets=true",
        "data.random_flip=true",
        "trainer.accumulate_grad_batches=3",
        "trainer.val_check_interval=3",
    ],
}
SCHEDULE = "model.lr_scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 3, gamma: 0.7}"


def settings(checkpoint: Path, scene_photos: Path, kind: str, way: str, out: Path) -> list[str]:
    """Of a training whose every step is logged."""
    common = [f"pretrained={checkpoint}", f"data.root={scene_photos}", "resolution=32", "data.batch_size=2"]
    common += [f"output_dir={out}", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "+steps=1", SCHEDULE]
    common += ["callbacks=[checkpoint,ema,samples,export]", "callbacks.checkpoint.every_n_train_steps=2"]
    common += KINDS[kind] if "callbacks=[checkpoint,export]" in KINDS[kind] else ["callbacks.ema.start_step=3"]
    common += [] if "callbacks=[checkpoint,export]" in KINDS[kind] else [*KINDS[kind], "objective.caption_dropout=0.4"]
    how = list(WAYS[way])
    if kind == "autoencoder" and "cache=all" in how:
        how.remove("cache=all")
    if kind in ("full", "textual_inversion") and "cache=all" in how:
        how[0] = "cache=latents"
    if any(setting.startswith("cache=") for setting in how):
        how.append(f"cache.folder={out.parent / 'cache'}")
    return common + how


def flat(value: object, name: str = "") -> dict[str, object]:
    """Tensors and numbers of a checkpoint, by their place in it."""
    if isinstance(value, dict):
        return {key: item for part, inner in value.items() for key, item in flat(inner, f"{name}/{part}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def ending(out: Path) -> dict[str, object]:
    """All that a training leaves: weights, optimizer, schedule, average, export."""
    newest = max((out / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    content = torch.load(newest, weights_only=True)
    kept = {name: content[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
    kept["average"] = content["callbacks"].get("EMA", {})
    loops = content["loops"]["fit_loop"]
    kept["place"] = [loops[name] for name in ("epoch_loop.batch_progress", "epoch_loop.state_dict", "epoch_progress")]
    for file in (out / "export").rglob("*.safetensors"):
        kept[str(file.relative_to(out))] = load_file(file)
    for file in (out / "export").rglob("*.json"):
        kept[str(file.relative_to(out))] = file.read_text()
    for file in (out / "samples").glob("*.png"):
        kept[str(file.relative_to(out))] = file.read_bytes()
    return flat(kept)


def logged(out: Path) -> dict[tuple[str, str], set[str]]:
    """Every figure that was logged, by step and name, over all parts of a training."""
    figures: dict[tuple[str, str], set[str]] = defaultdict(set)
    for file in out.glob("metrics*.csv"):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch") and name.startswith(("train/", "val/")):
                        figures[row["step"], name].add(value)
    return figures


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


@pytest.fixture(scope="module")
def straight(checkpoint, scene_photos, tmp_path_factory):
    """The folder of a training that is never stopped, for each kind and way."""
    made: dict[tuple[str, str], Path] = {}

    def of(kind: str, way: str) -> Path:
        if (kind, way) not in made:
            out = tmp_path_factory.mktemp("straight") / "out"
            run("train", *settings(checkpoint, scene_photos, kind, way, out), said=out.parent / "said")
            made[kind, way] = out
        return made[kind, way]

    return of


def resuming(out: Path) -> list[str]:
    return ["ckpt_path=last"] if list((out / "checkpoints").glob("*.ckpt")) else []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_killed_again_and_again_ends_where_an_unbroken_one_does(
    checkpoint, scene_photos, straight, tmp_path, kind, way
):
    out, said = tmp_path / "out", tmp_path / "said"
    common = settings(checkpoint, scene_photos, kind, way, out)
    chance = random.Random(f"{kind} {way}")
    killed = 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        if (out / "export").is_dir():  # the last signal came when all was done
            break
        before = newest_step(out)
        one = Command("train", *common, *resuming(out), said=said)
        wanted = before + chance.choice([1, 2, 3])
        while one.process.is_alive() and newest_step(out) < wanted:
            time.sleep(0.002)
        one.process.join(chance.random() * 0.15)
        if one.process.is_alive():
            one.send(number)
        status, words = one.ended(60)
        assert status in (0, 128 + number), words
        if status == 0:
            break
        killed += 1
    last = run("train", *common, *resuming(out), said=said) if not (out / "export").is_dir() else ""
    assert "broken" not in last
    assert killed >= 2
    assert_same(out, straight(kind, way))


def two_processes(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "trainer.devices=2", "trainer.strategy=ddp"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_two_processes_are_stopped_and_end_where_unbroken_ones_do(checkpoint, scene_photos, tmp_path):
    def common(out: Path) -> list[str]:
        return [*settings(checkpoint, scene_photos, "full", "cached", out), "data.batch_size=1"]

    out = tmp_path / "killed" / "out"
    straight = two_processes(*common(tmp_path / "straight" / "out"))
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9), (None, 0)):
        before = newest_step(out)
        one = two_processes(*common(out), *resuming(out))
        while number and one.poll() is None and newest_step(out) <= before:
            time.sleep(0.01)
        if number:
            os.killpg(one.pid, number)
        words, _ = one.communicate(timeout=120)
        assert one.returncode == status, words
    words, _ = straight.communicate(timeout=120)
    assert straight.returncode == 0, words
    assert_same(out, tmp_path / "straight" / "out")


def test_a_validation_that_was_made_again_is_not_taken_for_one_that_is_due(checkpoint, scene_photos, tmp_path):
    """Stopped in the validation of step 3, and once more behind it."""
    out, said = tmp_path / "out", tmp_path / "said"
    common = [f"pretrained={checkpoint}", f"data.root={scene_photos}", "resolution=32", "data.batch_size=2"]
    common += [f"output_dir={out}", "trainer.max_steps=5", "trainer.val_check_interval=3"]
    common += ["callbacks=[checkpoint,samples,export]", "callbacks.checkpoint.every_n_train_steps=1"]
    in_validation = Command("train", *common, "+steps=900", said=said)
    while in_validation.process.is_alive() and newest_step(out) < 3:
        time.sleep(0.01)
    time.sleep(0.3)
    in_validation.send(signal.SIGTERM)
    assert in_validation.ended()[0] == 143 and not list(out.glob("samples/*"))
    behind = Command("train", *common, "+steps=1", "ckpt_path=last", said=said)
    assert behind.killed(lambda: newest_step(out) == 4)
    run("train", *common, "+steps=1", "ckpt_path=last", said=said)
    files = out.glob("checkpoints/*.ckpt")
    assert max(torch.load(file, weights_only=True)["global_step"] for file in files) == 5
