"""A training on a streamed set: equal with packed latents, and resumed on another number of processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from typing_extensions import override

from benchmarks.forked import run, run_ranks
from benchmarks.streaming import served
from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.data import StreamingDataModule
from sdmodule.module import StableDiffusionModule
from tests.fitting import fit


class Losses(Callback):
    """The captions of all batches, and the losses."""

    def __init__(self) -> None:
        self.captions: list[list[str]] = []
        self.losses: list[float] = []

    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.captions.append(list(batch["caption"]))
        self.losses.append(float(outputs["loss"]))


def trained(checkpoint: Path, url: Path, tmp_path: Path, steps: int, *callbacks, resume=None, batch_size=4, **settings):
    seen = Losses()
    own = {"resolution": 32, "buckets": True, "random_flip": True, "shuffle_window": 1, **settings}
    data = StreamingDataModule(str(url), batch_size=batch_size, cache_folder=str(tmp_path / "shards"), **own)
    optimizer = {"optimizer": lambda weights: torch.optim.AdamW(weights, lr=1e-4)}
    fit(StableDiffusionModule(str(checkpoint), **optimizer), data, steps, seen, *callbacks, resume=resume)
    return seen


@pytest.mark.slow
def test_packed_latents_and_embeddings_train_as_the_images_do(checkpoint, packed, tmp_path):
    plain = trained(checkpoint, packed, tmp_path, 4)
    assert len({tuple(texts) for texts in plain.captions}) == 4
    for what in ("latents", "all"):
        cached = trained(checkpoint, packed, tmp_path, 4, LatentCache(tmp_path / "unused", what))
        assert cached.captions == plain.captions and cached.losses == pytest.approx(plain.losses, rel=1e-4)
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 3, 1])
def test_a_training_is_resumed_in_mid_epoch_with_batches_of_any_size(checkpoint, plain, tmp_path, batch_size):
    """Twenty-one images; the second half of the epoch in other batches."""
    settings = {"buckets": False}
    save = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2, filename="{step}")
    first = trained(checkpoint, plain, tmp_path, 2, save, batch_size=4, **settings)
    left = (21 - 8) // batch_size + ((21 - 8) % batch_size > 0 and batch_size != 4)
    again = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3, filename="again-{step}")
    second = trained(
        checkpoint, plain, tmp_path, 3, again, resume=tmp_path / "step=2.ckpt", batch_size=batch_size, **settings
    )
    third = trained(
        checkpoint, plain, tmp_path, 2 + left, resume=tmp_path / "again-step=3.ckpt", batch_size=batch_size, **settings
    )
    shown = [text for seen in (first, second, third) for batch in seen.captions for text in batch]
    assert len(second.captions) == 1 and len(third.captions) == left - 1
    assert len(shown) == len(set(shown)) == (20 if batch_size == 4 else 21)
    if batch_size == 4:
        with pytest.warns(UserWarning, match=r"data.shuffle_window has changed since the checkpoint was written"):
            resumed = {"resume": tmp_path / "step=2.ckpt", "shuffle_window": 2}
            trained(checkpoint, plain, tmp_path, 3, batch_size=4, **settings, **resumed)


@pytest.mark.slow
def test_two_processes_over_http_continue_what_one_began_and_one_continues_them(checkpoint, packed, tmp_path):
    """Three, three and two steps on one, two and one process, all within two epochs, against eight on one."""

    def weights(out: Path):
        return load_file(out / "export" / "unet" / "diffusion_pytorch_model.safetensors")

    with served(packed, tmp_path / "requests") as url:
        base = ["data=streaming", f"data.url={url}", "data.buckets=true", "resolution=32", f"pretrained={checkpoint}"]
        base += ["callbacks=[checkpoint,export]", "cache=all", "model.optimizer.lr=1e-4", "data.random_flip=true"]
        base += [f"data.cache_folder={tmp_path / 'shards'}", "data.shuffle_window=1", "callbacks.export.weights=raw"]
        run(
            "train",
            *base,
            "data.batch_size=4",
            "trainer.max_steps=8",
            f"output_dir={tmp_path / 'one'}",
            log=tmp_path / "a",
        )
        for number, (start, steps, size) in enumerate(((run, 3, 4), (run_ranks, 6, 2), (run, 8, 4))):
            resume = [] if not number else ["ckpt_path=last"]
            parts = [f"data.batch_size={size}", f"trainer.max_steps={steps}", f"output_dir={tmp_path / 'parts'}"]
            start("train", *base, *parts, *resume, log=tmp_path / f"log{number}")
    whole, parts = weights(tmp_path / "one"), weights(tmp_path / "parts")
    before = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    apart = max(float((parts[name] - whole[name]).norm() / whole[name].norm()) for name in whole)
    moved = max(float((before[name] - whole[name]).norm() / whole[name].norm()) for name in whole)
    print(f"{apart:.1e} from one process, {moved:.1e} from the start")
    assert apart <= 1e-5 < 1e-2 < moved
    rows = list(csv.DictReader((tmp_path / "one" / "metrics.csv").open()))
    assert rows
