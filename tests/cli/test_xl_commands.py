"""Stable Diffusion XL from the command line, with no key that names the family."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdmodule.cli.main import predict_main, train_main
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


def test_what_it_does_not_do_yet_is_said_in_one_sentence(call, checkpoint, xl_checkpoint, photos, tmp_path):
    index = tmp_path / "model"
    index.mkdir()
    shutil.copy(xl_checkpoint / "model_index.json", index)  # no weight is needed for the refusal
    common = [f"pretrained={index}", f"output_dir={tmp_path / 'out'}"]
    refused = "does not work with Stable Diffusion XL yet", f"pretrained={index}"
    photo = photos / "0.png"
    told(call(predict_main, "prompt=a", "model=inpaint", f"image={photo}", "mask=[2,2,20,20]", *common), *refused)
    told(call(predict_main, "prompt=a", "controlnet=net", f"control={photo}", *common), "controlnet=net", *refused)
    data = [f"data.root={photos}", "trainer.max_steps=1"]
    for tuning in ("full", "lora", "textual_inversion", "controlnet"):
        more = ["tuning.placeholder=<a>", "tuning.initializer=a"] if tuning == "textual_inversion" else []
        told(call(train_main, *common, *data, f"tuning={tuning}", *more), "training", *refused)
    told(call(train_main, *common, *data, "model=inpaint"), "training", *refused)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
        ),
        *("StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline"),
    ],
)
def test_other_pipelines_are_named_with_what_is_supported(call, xl_checkpoint, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    index = json.loads((xl_checkpoint / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    result = call(predict_main, "prompt=a", f"pretrained={folder}", f"output_dir={tmp_path / 'out'}")
    told(result, f"is a checkpoint of {name}", "Stable Diffusion XL (StableDiffusionXLPipeline)")
