"""A step is the same for one large batch, for accumulated smaller ones, and for a batch shared by two processes."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.forked import run, run_ranks
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.data.dreambooth import DreamBoothDataModule
from sdmodule.data.toy.scenes import caption, render, sample_scene
from sdmodule.module import StableDiffusionModule
from tests.fitting import fit

ADAM = partial(torch.optim.AdamW, lr=1e-3)
SHAPES = [(40, 40), (64, 32), (32, 64)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images of three shapes: six square, five wide and three tall."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(14):
        scene = sample_scene(random.Random(k))
        shape = SHAPES[0 if k < 6 else 1 if k < 11 else 2]
        render(scene, 64).resize(shape).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(caption(scene))
    return folder


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


Start = Callable[[list[str], Path], object]


def in_one_process(command: list[str], log: Path) -> None:
    run("train", *command, log=log)


def in_two_ranks(command: list[str], log: Path) -> None:
    run_ranks("train", *command, log=log)


def train(
    start: Start, checkpoint: Path, photos: Path, out: Path, *settings: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train ten steps, each on four images of one size, and validate on all images.

    Returns:
        The UNet's weights, and the losses of validation, raw and of the EMA.
    """
    command = [f"pretrained={checkpoint}", f"data.root={photos}", "resolution=32"]
    command += [f"output_dir={out}", "trainer.max_steps=10", "data.val_fraction=0", "data.buckets=true"]
    command += ["data.random_flip=true", "model.optimizer.lr=1e-4", "callbacks=[ema,export]", *settings]
    command += [f"data.val_root={photos}", "trainer.val_check_interval=10", "callbacks.ema.start_step=5"]
    command += ["callbacks.export.weights=raw"]
    start(command, out.parent / f"{out.name}-log")
    with (out / "metrics.csv").open() as file:
        [row] = [row for row in csv.DictReader(file) if row["val/loss"]]
    losses = {name: float(value) for name, value in row.items() if name.startswith("val/")}
    return load_file(out / "export" / "unet" / "diffusion_pytorch_model.safetensors"), losses


@pytest.fixture(scope="module")
def alone(checkpoint, photos, tmp_path_factory) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Ten steps in one process."""
    return train(in_one_process, checkpoint, photos, tmp_path_factory.mktemp("alone") / "out", "data.batch_size=4")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "all"])
def test_two_processes_train_as_one_does(checkpoint, photos, alone, tmp_path, cache):
    """Started as a cluster starts them; tests/faults/test_exact_resume.py lets Lightning start the second one."""
    settings = ["data.batch_size=2", f"cache={cache}"]
    if cache == "all":
        settings.append(f"cache.folder={tmp_path / 'cache'}")
    weights, losses = train(in_two_ranks, checkpoint, photos, tmp_path / "out", *settings)
    weights_alone, losses_alone = alone
    assert len(losses) == 10 and losses == pytest.approx(losses_alone, rel=1e-4)
    before = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    print(
        f"{cache}: {distance(weights, weights_alone):.1e} from it, {distance(before, weights_alone):.1e} from the start"
    )
    assert distance(weights, weights_alone) <= 1e-5 < 1e-2 < distance(before, weights_alone)
    if cache == "all":
        assert len(list((tmp_path / "cache").glob("moments-*/*"))) == 2, "each process encoded a share"


def train_in_process(
    checkpoint: Path,
    photos: Path,
    steps: int,
    *callbacks: Any,
    resume: Path | None = None,
    accumulate: int = 1,
    optimizer: Any = ADAM,
    **data,
) -> dict[str, Tensor]:
    module = StableDiffusionModule(str(checkpoint), optimizer=optimizer)
    settings = {"batch_size": 2, "val_fraction": 0, "center_crop": False, "random_flip": True, **data}
    images = ImageFolderDataModule(str(photos), 32, **settings)
    fit(module, images, steps, *callbacks, resume=resume, accumulate_grad_batches=accumulate)
    return module.unet.state_dict()


def test_accumulated_batches_train_as_one_large_one_does(checkpoint, photos):
    """With SGD, whose steps are proportional to the gradients; Adam turns even a rounding error into a full step."""
    plain = partial(torch.optim.SGD, lr=0.1)
    large, small = (
        train_in_process(checkpoint, photos, 3, batch_size=4 // n, accumulate=n, optimizer=plain) for n in (1, 2)
    )
    before = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    nonzero = {name: weight for name, weight in before.items() if weight.any()}
    assert distance(small, large) <= 1e-5 < 1e-2 < distance({name: large[name] for name in nonzero}, nonzero)


def test_accumulated_dreambooth_pairs_train_like_one_large_batch(checkpoint, photos):
    def trained(count: int, accumulate: int) -> dict[str, Tensor]:
        plain = partial(torch.optim.SGD, lr=0.1)
        module = StableDiffusionModule(str(checkpoint), optimizer=plain, objective={"caption_dropout": 0.5})
        kind = {"class_prompt": "a shape", "class_images": 14, "class_root": str(photos)}
        pairs = DreamBoothDataModule(str(photos), "a star", **kind, resolution=32, batch_size=count, val_fraction=0)
        fit(module, pairs, 3, accumulate_grad_batches=accumulate)
        return module.unet.state_dict()

    large, small, other = trained(4, 1), trained(2, 2), trained(2, 1)
    nonzero = {name: weight for name, weight in large.items() if weight.any()}
    ours, others = ({name: weights[name] for name in nonzero} for weights in (small, other))
    assert distance(ours, nonzero) <= 1e-5 < 1e-2 < distance(others, nonzero)


@pytest.mark.slow
def test_with_buckets_an_interrupted_training_ends_like_an_uninterrupted_one(checkpoint, photos, tmp_path):
    """An epoch has eight batches: three of square, three of wide and two of tall images."""
    every_step = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = train_in_process(checkpoint, photos, 12, every_step, buckets=True)
    for stop in (3, 8, 11):
        resumed = train_in_process(checkpoint, photos, 12, resume=tmp_path / f"step={stop}.ckpt", buckets=True)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight), f"stopped after step {stop}"
