"""Stable Diffusion XL from the command line, with no key that names the family."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdmodule.cli.main import predict_main, train_main
from sdmodule.components.checkpoint import family_of
from sdmodule.module import StableDiffusionModule
from tests.cli.test_commands import records, told

pytestmark = pytest.mark.slow  # most run a command


def pixels(path):
    return np.asarray(Image.open(path))


def test_predict_samples_and_makes_an_image_again(call, xl_checkpoint, tmp_path):
    out = tmp_path / "out"
    common = [
        'prompt=["a star", "a (red:1.2) circle"]',
        "negative_prompt=blue",
        "steps=2",
        f"pretrained={xl_checkpoint}",
    ]
    status, printed, complaint = call(predict_main, *common, f"output_dir={out}")
    assert status == 0, complaint
    ours = StableDiffusionModule.from_pretrained(xl_checkpoint).infer(
        "a star", negative_prompt="blue", num_inference_steps=2, scheduler="ddim", show_progress=False
    )["samples"][0]
    first, second = (out / record["file"] for record in records(out))
    assert np.abs(pixels(first).astype(int) - np.asarray(ours).astype(int)).max() <= 1  # in a batch of two there
    assert json.loads(Image.open(first).text["guidance_scale"]) == 5.0

    again = tmp_path / "again"
    assert call(predict_main, f"from={second}", "batch_size=1", f"output_dir={again}")[0] == 0
    status, printed, _ = call(predict_main, *common, f"output_dir={out}", "batch_size=1", "resume=true")
    assert status == 0 and "2 of 2 images are there" in printed
    [record] = records(again)
    alone = tmp_path / "alone"
    assert call(predict_main, *common, f"output_dir={alone}", "batch_size=1")[0] == 0
    assert np.array_equal(pixels(again / record["file"]), pixels(alone / records(alone)[1]["file"]))


def test_predict_samples_from_a_single_file(call, xl_checkpoint, tmp_path):
    StableDiffusionModule.from_pretrained(xl_checkpoint).save_pretrained(tmp_path / "xl", layout="single_file")
    found = []
    for k, pretrained in enumerate((xl_checkpoint, tmp_path / "xl" / "model.safetensors")):
        out = tmp_path / str(k)
        status, _, complaint = call(
            predict_main, "prompt=a star", "steps=2", f"pretrained={pretrained}", f"output_dir={out}"
        )
        assert status == 0, complaint
        found.append(pixels(out / records(out)[0]["file"]))
    assert np.array_equal(*found)


def test_predict_takes_an_adapter_and_makes_its_image_again(call, xl_checkpoint, tmp_path):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{layer}.lora_A.weight": torch.ones(2, 80), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, tmp_path / "a.safetensors")
    common = ["prompt=a star", "steps=2", f"pretrained={xl_checkpoint}"]
    adapted = f"adapters=[{{path: {tmp_path / 'a.safetensors'}, scale: 0.8}}]"
    assert call(predict_main, *common, f"output_dir={tmp_path / 'plain'}")[0] == 0
    assert call(predict_main, *common, adapted, f"output_dir={tmp_path / 'out'}")[0] == 0
    [image] = (tmp_path / "out" / "images").glob("*.png")
    assert call(predict_main, f"from={image}", f"output_dir={tmp_path / 'again'}")[0] == 0
    plain, again = (tmp_path / name / "images" / image.name for name in ("plain", "again"))
    assert np.array_equal(pixels(image), pixels(again)) and not np.array_equal(pixels(image), pixels(plain))


@pytest.fixture
def train(call, xl_checkpoint, photos, tmp_path):
    """Train with the command; returns the folder of the run."""

    def run(*settings):
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        common = [f"pretrained={xl_checkpoint}", f"data.root={photos}", f"output_dir={out}", "sampler.steps=2"]
        common += [f"cache.folder={tmp_path / 'cache'}"] if "cache=none" not in settings else []
        status, printed, error = call(train_main, *common, *settings)
        assert status == 0, error
        return out, printed

    return run


def test_the_lora_experiment_trains_an_adapter_that_predict_samples_with(call, train, xl_checkpoint, tmp_path):
    settings = ["trainer.max_steps=20", "trainer.val_check_interval=10", "trainer.accumulate_grad_batches=1"]
    more = ["data.val_fraction=0.2", "trainer.precision=32-true", "model.optimizer.lr=1e-2"]
    run, printed = train("experiment=sdxl_lora", *settings, *more)
    assert "adapters=" in printed and f"pretrained={xl_checkpoint}" in printed
    assert {file.name for file in (run / "export").glob("*.safetensors")} == {
        "kohya.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    assert "resolution: 32\n" in (run / "config.yaml").read_text()  # the checkpoint's own
    sheets = sorted(file.name for file in (run / "samples").glob("*.png"))
    assert sheets == ["000000.png", "000010.png", "000020.png"]
    common = ["prompt=image 1", "steps=2", f"pretrained={xl_checkpoint}"]
    assert call(predict_main, *common, f"output_dir={tmp_path / 'plain'}")[0] == 0
    adapted = f"adapters=[{run / 'export'}]"
    assert call(predict_main, *common, adapted, f"output_dir={tmp_path / 'adapted'}")[0] == 0
    plain, adapted = (next((tmp_path / name / "images").glob("*.png")) for name in ("plain", "adapted"))
    assert Image.open(adapted).size == (32, 32)  # the checkpoint's own resolution
    assert not np.array_equal(pixels(plain), pixels(adapted))


def test_the_dreambooth_experiment_samples_class_images_first(train, tmp_path):
    prompts = ["data.prompt=a photo of sks star", "data.class_prompt=a photo of a star"]
    settings = ["trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "trainer.precision=32-true"]
    made = tmp_path / "prior"
    run, _ = train(
        "experiment=sdxl_dreambooth_lora", *prompts, *settings, "data.class_images=2", f"data.made_in={made}"
    )
    assert len(list(made.rglob("prior-*.png"))) == 2
    assert (run / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_the_full_experiment_writes_a_checkpoint(train, xl_checkpoint):
    settings = ["trainer.max_steps=1", "trainer.accumulate_grad_batches=1", "trainer.precision=bf16-mixed"]
    run, _ = train("experiment=sdxl_full", *settings, "cache=none", "tuning.text_encoder=true", "validate_first=false")
    names = {folder.name for folder in (run / "export").iterdir() if folder.is_dir()}
    assert names == {folder.name for folder in xl_checkpoint.iterdir() if folder.is_dir()}
    parts = StableDiffusionModule.from_pretrained(run / "export").parts
    before = StableDiffusionModule.from_pretrained(xl_checkpoint).parts
    for name in ("unet", "text_encoder", "text_encoder_2"):
        changed = zip(getattr(parts, name).parameters(), getattr(before, name).parameters(), strict=True)
        assert any(not torch.equal(ours, theirs) for ours, theirs in changed), name


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"])
def test_other_pipelines_are_named_with_what_is_supported(call, xl_checkpoint, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    index = json.loads((xl_checkpoint / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    result = call(predict_main, "prompt=a", f"pretrained={folder}", f"output_dir={tmp_path / 'out'}")
    told(result, f"is a checkpoint of {name}", "Stable Diffusion XL (StableDiffusionXLPipeline and its")


@pytest.mark.parametrize("name", ["Img2Img", "Inpaint", "ControlNet"])
def test_a_checkpoint_may_name_any_of_its_pipelines(xl_checkpoint, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    index = json.loads((xl_checkpoint / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": f"StableDiffusionXL{name}Pipeline"}))
    assert family_of(str(folder)).title == "Stable Diffusion XL"
