"""Timings of a run, without depending on the machine."""

import json

import pytest
from lightning import Trainer

from sdmodule.callbacks.prediction_writer import PredictionWriter
from sdmodule.callbacks.timing import TimingLogger
from sdmodule.data.prompts import PromptDataModule
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.module import StableDiffusionModule


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


def trainer(*callbacks, **settings):
    return Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings,
    )


def predict(checkpoint, folder, steps, images=1, **settings):
    module = StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": steps})
    data = PromptDataModule(["a"] * images, batch_size=1)
    callbacks = [PredictionWriter(folder), TimingLogger(folder, **settings)]
    trainer(*callbacks).predict(module, data, return_predictions=False)
    return json.loads((folder / "timings.json").read_text())


def test_the_first_batch_counts_as_warmup(checkpoint, tmp_path):
    timings = predict(checkpoint, tmp_path, steps=2, images=3)
    assert timings["images"] == 3 and timings["warmup"]["images"] == 1 and "mfu" not in timings
    assert timings["seconds"].keys() == {"text", "denoise", "decode", "save"}
    assert timings["warmup"]["seconds"].keys() == {"text", "denoise", "decode"}
    assert 0 < timings["step_seconds"]["median"] <= timings["step_seconds"]["p95"]
    assert timings["step_seconds"]["median"] < timings["seconds"]["denoise"] < timings["seconds_total"]


@pytest.mark.slow
def test_flops_grow_linearly_with_the_steps(checkpoint, tmp_path):
    flops = [predict(checkpoint, tmp_path / str(n), n, peak_flops=1e12)["flops_per_image"] for n in (1, 2, 3)]
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0
    more = predict(checkpoint, tmp_path / "more", 1, images=2, peak_flops=1e12)
    assert more["flops_per_image"] == flops[0] and more["mfu"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "accumulate"), [(2, 1), (6, 1), (6, 3)])
def test_trainings_shorter_and_longer_than_the_warmup_are_timed(checkpoint, tmp_path, steps, accumulate):
    module = StableDiffusionModule(str(checkpoint))
    timing = TimingLogger(tmp_path, warmup_steps=3, peak_flops=1e12)
    data = ShapesDataModule(batch_size=2, train_length=4, val_length=2, size=32)
    settings = {"max_steps": steps, "accumulate_grad_batches": accumulate}
    trainer(timing, limit_val_batches=1, num_sanity_val_steps=0, **settings).fit(module, data)
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert timings["steps"] == steps and (timings["warmup"] or {"steps": 0})["steps"] == (3 if steps == 6 else 0)
    assert timings["samples_per_second"] > 0 and 0 <= timings["data_wait"] <= 1 and timings["mfu"] > 0
