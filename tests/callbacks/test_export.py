"""The export: a folder that diffusers samples from, with ``training.json``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning import Callback

from sdmodule.callbacks.ema import EMA
from sdmodule.callbacks.export import Export
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests import fitting

EXPORTED = {"weights": "raw", "steps": 2, "dtype": "float32", "layout": "diffusers"}


def fit(checkpoint: Path, *callbacks: Callback) -> StableDiffusionModule:
    module = StableDiffusionModule(str(checkpoint), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fitting.fit(module, ShapesDataModule(batch_size=2, train_length=4, size=32), 2, *callbacks, limit_val_batches=0)
    return module


def sample(folder: Path) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red star", num_inference_steps=2, generator=generator, output_type="np").images


def test_diffusers_samples_alike_from_the_export(checkpoint, tmp_path):
    module = fit(checkpoint, Export(tmp_path))
    ours = module.infer("a red star", num_inference_steps=2, return_type="numpy")["samples"]
    np.testing.assert_allclose(sample(tmp_path), ours, rtol=0, atol=1 / 255)
    assert not np.allclose(sample(tmp_path), sample(checkpoint), atol=0.05), "training changed the image"
    assert json.loads((tmp_path / "training.json").read_text()) == EXPORTED


def test_the_average_is_exported_by_default(checkpoint, tmp_path):
    ema = EMA(start_step=1)
    module = fit(checkpoint, Export(tmp_path), ema)
    exported = StableDiffusionModule.from_pretrained(str(tmp_path)).unet.conv_in.weight
    assert torch.equal(exported, ema.average["unet.conv_in.weight"])
    assert not torch.equal(exported, module.unet.conv_in.weight), "the module keeps its raw weights"
    assert json.loads((tmp_path / "training.json").read_text())["weights"] == "ema"


def test_raw_weights_are_exported_on_request(checkpoint, tmp_path):
    module = fit(checkpoint, Export(tmp_path, weights="raw"), EMA(start_step=1))
    exported = StableDiffusionModule.from_pretrained(str(tmp_path)).unet.conv_in.weight
    assert torch.equal(exported, module.unet.conv_in.weight)
    assert json.loads((tmp_path / "training.json").read_text())["weights"] == "raw"


def test_raw_weights_are_exported_before_there_is_an_average(checkpoint, tmp_path):
    module = fit(checkpoint, Export(tmp_path, dtype="float16"), EMA(start_step=100))
    exported = StableDiffusionModule.from_pretrained(str(tmp_path)).unet.conv_in.weight
    torch.testing.assert_close(exported, module.unet.conv_in.weight, rtol=1e-3, atol=1e-3)
    metadata = EXPORTED | {"dtype": "float16"}
    assert json.loads((tmp_path / "training.json").read_text()) == metadata


def test_unknown_dtype_and_weights_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"export\.dtype=bfloat16: unknown; choose one of float16, float32"):
        Export(tmp_path, dtype="bfloat16")
    with pytest.raises(SettingsError, match=r"export\.weights=both: unknown; choose one of ema, raw"):
        Export(tmp_path, weights="both")


def test_another_layout_is_not_yet_exported(tmp_path):
    for written in ({"steps": 2}, {"steps": 2, "layout": "diffusers"}):  # 0.1.0 did not say
        (tmp_path / "training.json").write_text(json.dumps(written))
        assert Export(tmp_path).holds(2) and not Export(tmp_path).holds(3)
        assert not Export(tmp_path, layout="single_file").holds(2)
