"""A checkpoint written as a single file is read by diffusers and by this package, and says what it is."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdmodule.components.checkpoint import Components, load_components, load_part
from sdmodule.components.inpaint_unet import convert_to_inpaint
from sdmodule.components.modelspec import modelspec
from sdmodule.components.save import save_components
from sdmodule.components.write_single_file import save_single_file, save_single_vae
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests.original_layout import original_layout

pytestmark = pytest.mark.slow  # each writes and reads a checkpoint

PIPELINES = {
    "1.x": StableDiffusionPipeline,
    "2.x": StableDiffusionPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
    "xl": StableDiffusionXLPipeline,
    "xl inpainting": StableDiffusionXLInpaintPipeline,
}
ARCHITECTURES = {
    "1.x": "stable-diffusion-v1",
    "2.x": "stable-diffusion-v1",  # by the width of the text, which is that of neither here
    "inpainting": "stable-diffusion-v1-inpainting",
    "xl": "stable-diffusion-xl-v1-base",
    "xl inpainting": "stable-diffusion-xl-v1-inpainting",
}


@pytest.fixture(params=PIPELINES)
def kind(request):
    return request.param


@pytest.fixture
def parts(kind, checkpoint, xl_checkpoint) -> Components:
    """A tiny checkpoint of each kind."""
    parts = load_components(str(xl_checkpoint if kind.startswith("xl") else checkpoint))
    if "inpainting" in kind:
        convert_to_inpaint(parts.unet)
    if kind == "2.x":
        parts.text_encoder.config.hidden_act = "gelu"
        linear = {**parts.unet.config, "use_linear_projection": True}
        parts.unet = UNet2DConditionModel.from_config(linear)
        parts.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return parts


def assert_equal_weights(one: Components, other: Components) -> None:
    for name, network in one.networks.items():
        weights, others = network.state_dict(), other.networks[name].state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights), name


def test_a_round_trip_gives_equal_weights_and_the_keys_of_the_original(parts, kind, tmp_path):
    save_single_file(parts, tmp_path)
    file = tmp_path / "model.safetensors"
    again = load_components(str(file))
    assert_equal_weights(again, parts)
    assert again.family is parts.family and again.zero_empty_prompts == parts.zero_empty_prompts
    assert again.guidance_scale == parts.guidance_scale
    assert again.scheduler.config.prediction_type == parts.scheduler.config.prediction_type
    assert len(again.tokenizer) == len(parts.tokenizer)
    written, expected = load_file(file), original_layout(parts.networks)
    marks = {"v_pred", "ztsnr"} if kind == "2.x" else set()
    assert written.keys() == expected.keys() - {"model_ema.decay"} | marks
    assert all(torch.equal(written[key], expected[key]) for key in written.keys() - marks)


def test_diffusers_samples_equal_images_from_the_file(parts, kind, tmp_path):
    save_single_file(parts, tmp_path)
    save_components(parts, tmp_path / "folder")
    pipelines = [
        PIPELINES[kind].from_single_file(
            str(tmp_path / "model.safetensors"), config=str(tmp_path / "model"), local_files_only=True
        ),
        PIPELINES[kind].from_pretrained(tmp_path / "folder"),
    ]
    options = {"num_inference_steps": 2, "output_type": "np"}
    if "inpainting" in kind:
        gray = np.full((1, 32, 32, 3), 0.4, np.float32)
        options |= {"image": gray, "mask_image": (gray[..., 0] > 0).astype(np.float32), "height": 32, "width": 32}
        options["strength"] = 1.0
    images = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline("a red circle", generator=torch.Generator().manual_seed(0), **options).images)
    assert np.array_equal(*images)


def test_the_header_says_what_the_file_is(parts, kind, tmp_path):
    save_single_file(parts, tmp_path, "float16")
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        assert {str(opened.get_tensor(key).dtype) for key in opened.keys()} == {"torch.float16"}
    content = file.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    assert header["modelspec.architecture"] == ARCHITECTURES[kind]
    assert header["modelspec.title"] == Path(parts.source).name
    assert header["modelspec.resolution"] == "32x32"
    assert header["modelspec.prediction_type"] == ("v" if kind == "2.x" else "epsilon")
    assert datetime.fromisoformat(header["modelspec.date"]).tzinfo is not None
    texts = [json.dumps(header), *(path.read_text() for path in tmp_path.rglob("*.json"))]
    assert not any(re.search(r"/tmp|pytest-of", text) for text in texts)


@pytest.mark.parametrize(
    ("width", "inpainting", "predicted", "name"),
    [
        (768, False, "epsilon", "stable-diffusion-v1"),
        (1024, False, "epsilon", "stable-diffusion-v2-512"),
        (1024, False, "v_prediction", "stable-diffusion-v2-768-v"),
        (1024, True, "epsilon", "stable-diffusion-v2-inpainting"),
    ],
)
def test_the_architecture_follows_from_width_and_prediction(checkpoint, width, inpainting, predicted, name):
    family = load_components(str(checkpoint)).family
    assert family.architecture(width, inpainting, predicted)[0] == name


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0"),
        ("~/models/dream.v2.safetensors", "dream.v2"),
        ("/data/my_run/export", "my_run"),
        ("my_run/export/model.safetensors", "my_run"),
        ("~/export", "stable-diffusion-v1"),
        ("tiny", "tiny"),
    ],
)
def test_the_title_is_the_name_of_the_model_and_no_path(checkpoint, source, title):
    parts = replace(load_components(str(checkpoint)), source=source)
    assert modelspec(parts, {})["modelspec.title"] == title


def test_a_broken_configuration_beside_the_file_is_named(checkpoint, tmp_path):
    save_single_file(load_components(str(checkpoint)), tmp_path)
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "unet/config.json", "model_index.json"):
        file = tmp_path / "model" / name
        whole = file.read_text()
        file.write_text("{")
        with pytest.raises(SettingsError, match=r"model\.safetensors: .*"):
            load_components(str(tmp_path / "model.safetensors"))
        file.write_text(whole)


def test_python_and_predict_take_the_layout(checkpoint, tmp_path):
    module = StableDiffusionModule.from_pretrained(checkpoint)
    module.save_pretrained(tmp_path, layout="single_file")
    again = StableDiffusionModule.from_pretrained(tmp_path / "model.safetensors")
    options = {"num_inference_steps": 2, "return_type": "numpy", "show_progress": False}
    assert np.array_equal(*(one.infer("a star", **options)["samples"] for one in (module, again)))
    with pytest.raises(SettingsError, match=r"in one file; give pretrained=.*/model\.safetensors"):
        StableDiffusionModule.from_pretrained(tmp_path)


def test_a_layout_that_does_not_exist_is_refused(checkpoint, tmp_path):
    module = StableDiffusionModule.from_pretrained(checkpoint)
    with pytest.raises(SettingsError, match="layout=ckpt: tuning=full is exported as diffusers, single_file; choose"):
        module.save_pretrained(tmp_path, layout="ckpt")
    lora = StableDiffusionModule.from_pretrained(checkpoint, tuning={"kind": "lora"})
    with pytest.raises(SettingsError, match="layout=single_file: tuning=lora is exported as "):
        lora.save_pretrained(tmp_path, layout="single_file")


def test_a_network_that_the_original_does_not_have_is_refused(checkpoint, tmp_path):
    parts = load_components(str(checkpoint))
    parts.unet = UNet2DConditionModel.from_config({**parts.unet.config, "time_cond_proj_dim": 8})
    with pytest.raises(SettingsError, match=r"has no names for time_embedding\.cond_proj\.weight, which this unet has"):
        save_single_file(parts, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_vae_alone_is_read_by_us_and_by_diffusers(checkpoint, tmp_path):
    vae = load_part("vae", str(checkpoint))
    save_single_vae(vae, tmp_path)
    file = str(tmp_path / "vae.safetensors")
    theirs = AutoencoderKL.from_single_file(file, config=str(tmp_path / "vae"), local_files_only=True)
    ours = load_components(str(checkpoint), components={"vae": file}).vae
    for read in (theirs, ours):
        assert all(torch.equal(value, read.state_dict()[key]) for key, value in vae.state_dict().items())


def test_a_learned_word_is_not_written_into_a_checkpoint(checkpoint, tmp_path):
    save_file({"<my-cat>": torch.zeros(2, 32)}, tmp_path / "word.safetensors")
    word = {"files": [str(tmp_path / "word.safetensors")], "merge": True}
    module = StableDiffusionModule.from_pretrained(checkpoint, adapters=word)
    for layout in ("diffusers", "single_file"):
        with pytest.raises(SettingsError, match="a learned word is not written into a checkpoint"):
            module.save_pretrained(tmp_path / layout, layout=layout)
