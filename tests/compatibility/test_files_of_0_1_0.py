"""What version 0.1.0 wrote is read, resumed and made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sdmodule.cli.main import predict_main, train_main
from sdmodule.module import StableDiffusionModule
from tests.compatibility.make import ADAPTER, FOLDER, LARGEST, PREDICT, TRAIN

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="tests/compatibility/make.py has not been run")

CHECKPOINT = Path("training", "checkpoints", "last.ckpt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files in the current folder."""
    copy = shutil.copytree(FOLDER, tmp_path / "0.1.0")
    monkeypatch.chdir(copy)
    return copy


def images(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("images/*.png"))}


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Equal pixels, as far as another processor rounds alike."""
    assert ours.keys() == theirs.keys()
    for name, image in theirs.items():
        assert np.abs(ours[name] - image).max() <= 1


def test_the_files_are_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= LARGEST


def test_a_training_is_resumed_and_ends_where_0_1_0_ended(call, folder):
    status, _, errors = call(train_main, *TRAIN, "output_dir=training", "ckpt_path=last", "trainer.max_steps=6")
    assert (status, errors) == (0, "")
    checkpoints = [torch.load(file, weights_only=True) for file in CHECKPOINT.parent.glob("*.ckpt")]
    assert max(checkpoint["global_step"] for checkpoint in checkpoints) == 6
    before = load_file(FOLDER / "training" / "export" / ADAPTER)
    ours, theirs = load_file(folder / "training" / "export" / ADAPTER), load_file(FOLDER / "six_steps.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    moved = max(float((theirs[name] - before[name]).abs().max()) for name in theirs)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 0.01 * moved


def test_a_checkpoint_is_a_module_that_samples(folder):
    module = StableDiffusionModule.load_from_checkpoint(CHECKPOINT)
    [image] = module.infer("a red circle", num_inference_steps=2, seed=0)["samples"]
    assert image.size == (32, 32)


def test_an_export_is_loaded_by_diffusers(folder):
    pipeline = StableDiffusionPipeline.from_pretrained("base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "generator": generator}
        return pipeline("a red circle", output_type="np", **settings).images

    plain = sample()
    pipeline.load_lora_weights("training/export", weight_name=ADAPTER)
    assert not np.array_equal(sample(), plain)


def test_an_export_is_an_adapter(call, folder):
    settings = ["pretrained=base", "prompt=a red circle", "steps=2"]
    assert call(predict_main, *settings, "output_dir=plain")[0] == 0
    assert call(predict_main, *settings, "adapters=[{path: training/export}]", "output_dir=adapted")[0] == 0
    [plain], [adapted] = images(Path("plain")).values(), images(Path("adapted")).values()
    assert (plain != adapted).any()


@pytest.mark.parametrize("name", ["00000-3.png", "00003-6.png"])
def test_an_image_is_made_again_from_itself(call, folder, name):
    status, _, errors = call(predict_main, f"from=prediction/images/{name}", "output_dir=again")
    assert (status, errors) == (0, "")
    [again] = images(Path("again")).values()
    assert_equal({name: again}, {name: images(Path("prediction"))[name]})


def test_a_prediction_is_made_again_from_its_command(call, folder):
    assert call(predict_main, *PREDICT, "output_dir=again")[0] == 0
    assert_equal(images(Path("again")), images(Path("prediction")))


def test_a_run_folder_is_resumed(call, folder):
    Path("prediction", "images", "00002-5.png").unlink()
    status, printed, errors = call(predict_main, *PREDICT, "output_dir=prediction", "resume=true")
    assert (status, errors) == (0, "") and "3 of 4 images are there" in printed
    assert_equal(images(Path("prediction")), images(FOLDER / "prediction"))
    lines = Path("prediction", "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    held = (FOLDER / "prediction" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for ours, theirs in zip(map(json.loads, lines), map(json.loads, held), strict=True):
        assert {**theirs, "seconds": 0} == {key: value for key, value in ours.items() if key in theirs} | {"seconds": 0}
