"""A run that is killed at random moments loses nothing, and what it resumes to is the same."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.forked import FORKED, finish_despite_kills, run
from sdmodule.callbacks.export import Export
from sdmodule.components.checkpoint import load_components
from sdmodule.module import StableDiffusionModule
from tests.faults.conftest import write_scenes


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


def cached(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.rglob("*.safetensors"):
        tensors |= {f"{file.parent.name}/{key}": value for key, value in load_file(file).items()}
    return tensors


def test_a_cache_killed_again_and_again_has_the_same_tensors(checkpoint, tmp_path):
    photos = write_scenes(tmp_path / "photos", 120)
    common = [f"pretrained={checkpoint}", f"data.root={photos}", "resolution=64", "data.random_flip=true"]
    common += ["trainer.max_steps=1", "data.buckets=true", "callbacks=[]", "logger=none", "cache=all"]
    common += [f"output_dir={tmp_path / 'out'}"]
    run("train", "--cfg", "job", log=tmp_path / "log")  # the imports come before time is taken
    start = time.perf_counter()
    run("train", *common, f"cache.folder={tmp_path / 'straight'}", log=tmp_path / "log")
    seconds = time.perf_counter() - start
    finish_despite_kills(
        "train",
        *common,
        f"cache.folder={tmp_path / 'killed'}",
        log=tmp_path / "log",
        kills=2,
        longest=seconds * 0.9,
        rng=random.Random(1),
        output=tmp_path / "killed",
    )
    ours, theirs = cached(tmp_path / "killed"), cached(tmp_path / "straight")
    assert len(theirs) > 240 and ours.keys() == theirs.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert "broken" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("task", ["text2image", "inpaint"])
def test_a_prediction_killed_again_and_again_makes_the_same_images(checkpoint, tmp_path, task):
    prompts = json.dumps(["a red circle on a blue background", "a small green star", "a (blue:1.2) heart, " * 30])
    common = [f"prompt={prompts}", "num_images_per_prompt=8", "batch_size=5", "steps=3", f"pretrained={checkpoint}"]
    if task == "inpaint":
        Image.effect_mandelbrot((48, 40), (-3, -2.5, 2, 2.5), 100).save(tmp_path / "photo.png")
        common += ["model=inpaint", f"image={tmp_path / 'photo.png'}", "mask=[4,4,20,30]"]
    straight, out = tmp_path / "straight", tmp_path / "out"
    run("predict", *common, f"output_dir={straight}", log=tmp_path / "log")

    def finished_images() -> int:
        return len(list((out / "images").glob("*.png")))

    finish_despite_kills(
        "predict",
        *common,
        f"output_dir={out}",
        "resume=true",
        log=tmp_path / "log",
        kills=3 if task == "text2image" else 2,
        progress=finished_images,
        longest=0.1,
        rng=random.Random(task),
        output=out,
    )
    (out / "timings.json").touch()  # absent if the last run had nothing left to do
    files = sorted(path.relative_to(straight) for path in straight.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    for name in files:
        if name.suffix == ".png":
            assert Image.open(out / name).tobytes() == Image.open(straight / name).tobytes()
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(24))


def export_forever(checkpoint: str, folder: str) -> None:
    """Export a UNet of ones, then one of zeros, then of ones again, and so on."""
    module = StableDiffusionModule.from_pretrained(checkpoint)
    step = 0
    while True:
        step += 1
        with torch.no_grad():
            for weight in module.unet.parameters():
                weight.fill_(step % 2)
        trainer = SimpleNamespace(is_global_zero=True, callbacks=[], loggers=[], global_step=step % 2)
        Export(folder).on_train_end(trainer, module)


def test_an_export_killed_again_and_again_is_complete_each_time(checkpoint, tmp_path):
    folder, rng = tmp_path / "export", random.Random(2)
    seen: set[int] = set()
    for attempt in range(40):
        if attempt >= 6 and seen == {0, 1}:  # how long one takes depends on the machine
            break
        process = FORKED.Process(target=export_forever, args=(str(checkpoint), str(folder)))
        process.start()
        before = folder.stat().st_ino if folder.is_dir() else 0
        while not folder.is_dir() or folder.stat().st_ino == before:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.join()
        step = json.loads((folder / "training.json").read_text())["steps"]
        unet = load_components(str(folder)).unet
        assert all((weight == step).all() for weight in unet.parameters())
        seen.add(step)
    assert seen == {0, 1}
