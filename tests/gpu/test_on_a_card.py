"""What a user would notice on a GPU."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.gpu_correctness import TUNINGS
from benchmarks.tome_runs import psnr
from sdmodule.cli.main import predict_main, train_main
from sdmodule.module import StableDiffusionModule

PROMPT = "a red circle on a blue background"
SETTINGS = {"seed": 3, "num_inference_steps": 10, "return_type": "tensor", "show_progress": False}


def sample(module, **settings):
    return module.infer(PROMPT, **{**SETTINGS, **settings})["samples"]


def test_the_images_of_the_cpu_up_to_rounding(tiny):
    expected = sample(StableDiffusionModule.from_pretrained("tiny"))
    assert psnr(sample(tiny), expected) > 40  # convolutions may use TF32


@pytest.mark.parametrize("engine", ["none", "exact", "window"])
def test_the_same_images_twice(tiny, engine):
    tome = {"ratio": 0} if engine == "none" else {"ratio": 0.5, "engine": engine}
    assert torch.equal(sample(tiny, tome=tome), sample(tiny, tome=tome))


def test_an_image_does_not_depend_on_its_batch_up_to_rounding(tiny):
    assert psnr(sample(tiny, num_images_per_prompt=4)[:1], sample(tiny)) > 40


@pytest.mark.parametrize(("preset", "least"), [("rounding", 40), ("fast", 12), ("turbo", 10)])
def test_presets_stay_within_their_error(call, tmp_path, preset, least):
    made = {}
    for speed in ("exact", preset):
        words = [f"prompt={PROMPT}", "trainer=gpu", f"speed={speed}", f"output_dir={tmp_path / speed}"]
        status, _, complaint = call(predict_main, *words)
        assert status == 0, complaint
        image = Image.open(next((tmp_path / speed / "images").glob("*.png")))
        made[speed] = torch.from_numpy(np.asarray(image).copy()).float() / 255
    assert psnr(made[preset], made["exact"]) > least
    assert json.loads((tmp_path / preset / "timings.json").read_text())["peak_memory_bytes"] > 0


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_takes_a_step(call, tmp_path, tuning):
    words = ["data=emoji", "data.batch_size=2", "trainer=gpu", "trainer.max_steps=2", "trainer.limit_val_batches=0"]
    words += ["validate_first=false", "callbacks=[export,timing]", f"output_dir={tmp_path}"]
    status, _, complaint = call(train_main, *words, *TUNINGS[tuning])
    assert status == 0, complaint
    files = list((tmp_path / "export").rglob("*.safetensors"))
    assert files and all(value.isfinite().all() for file in files for value in load_file(file).values())
    assert json.loads((tmp_path / "timings.json").read_text())["device"].startswith("cuda")


def test_ddp_on_one_card(call, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    words = ["data=emoji", "trainer=ddp", "trainer.devices=1", "trainer.max_steps=2", "trainer.limit_val_batches=0"]
    try:
        words += ["validate_first=false", "callbacks=[]", f"output_dir={tmp_path}"]
        status, _, complaint = call(train_main, *words)
        assert status == 0, complaint
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "settings", [{}, {"tome": {"ratio": 0.5}}, {"speed": {"cache_every": 2}}], ids=["plain", "merged", "cached"]
)
def test_no_step_after_the_first_waits_for_the_device(tiny, settings):
    def watched(step, latents):
        torch.cuda.set_sync_debug_mode("error" if step < 9 else "default")

    try:
        sample(tiny, callback_on_step_end=watched, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
