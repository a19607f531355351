"""Sampling with a ControlNet equals diffusers' pipeline, from Python and on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from sdmodule.cli.main import predict_main
from sdmodule.components.checkpoint import load_components
from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.save import save_model
from sdmodule.conditioning.canny import canny_edges
from sdmodule.data.toy.scenes import render, sample_scene
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule

PROMPT, OTHER = "a red circle on a blue background", "a white star"


@pytest.fixture(scope="module")
def controlnet(checkpoint, tmp_path_factory) -> Path:
    """Folder of a ControlNet with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = controlnet_from_unet(load_components(str(checkpoint)))
        for weight in network.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("controlnet")
    save_model(network, folder)
    return folder


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    import random

    return render(sample_scene(random.Random(1)), 32)


@pytest.mark.parametrize("settings", [{}, {"control_scale": 0.4}, {"guidance_scale": 1.0}], ids=str)
def test_images_equal_those_of_diffusers(checkpoint, controlnet, photo, settings):
    sd = StableDiffusionModule.from_pretrained(str(checkpoint), components={"controlnet": str(controlnet)})
    settings = {"num_inference_steps": 4, "guidance_scale": 7.5, "negative_prompt": OTHER, **settings}
    edges = canny_edges(photo)
    ours = sd.infer(PROMPT, control=edges, seed=3, num_images_per_prompt=2, return_type="numpy", **settings)["samples"]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        checkpoint, controlnet=ControlNetModel.from_pretrained(controlnet)
    )
    pipeline.set_progress_bar_config(disable=True)
    settings["controlnet_conditioning_scale"] = settings.pop("control_scale", 1.0)
    generators = [torch.Generator().manual_seed(3 + k) for k in range(2)]
    theirs = pipeline(PROMPT, edges, num_images_per_prompt=2, generator=generators, output_type="np", **settings).images
    np.testing.assert_array_equal(ours, theirs)


def test_a_scale_of_zero_equals_no_controlnet(checkpoint, controlnet, photo):
    sd = StableDiffusionModule.from_pretrained(str(checkpoint), components={"controlnet": str(controlnet)})
    plain = StableDiffusionModule.from_pretrained(str(checkpoint))
    settings = {"num_inference_steps": 3, "return_type": "numpy"}
    none = sd.infer(PROMPT, control=photo, control_scale=0.0, **settings)["samples"]
    assert np.array_equal(none, plain.infer(PROMPT, **settings)["samples"])
    assert not np.array_equal(sd.infer(PROMPT, control=photo, **settings)["samples"], none)


def test_the_command_follows_a_photo_and_reproduces_the_image_from_its_metadata(
    checkpoint, controlnet, photo, tmp_path, call
):
    photo.save(tmp_path / "photo.png")
    shutil.copytree(controlnet, tmp_path / "net")
    common = ["steps=3", f"prompt={PROMPT}", f"pretrained={checkpoint}", f"controlnet={tmp_path / 'net'}"]
    first, again = tmp_path / "first", tmp_path / "again"
    command = [*common, f"control={tmp_path / 'photo.png'}", "control_edges=true", "control_scale=0.7"]
    assert call(predict_main, *command, f"output_dir={first}")[0] == 0
    [inputs] = (first / "inputs").iterdir()
    assert np.array_equal(np.asarray(Image.open(inputs)), np.asarray(canny_edges(photo)))
    made = first / "images" / "00000-0.png"
    assert Image.open(made).text["control_scale"] == "0.7"
    assert call(predict_main, "--from", made, f"output_dir={again}")[0] == 0
    assert np.array_equal(np.asarray(Image.open(again / "images" / made.name)), np.asarray(Image.open(made)))
    inputs.unlink()
    status, _, error = call(predict_main, "--from", made, f"output_dir={tmp_path / 'third'}")
    assert status == 1 and "add control=…" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["control=photo.png"], "add controlnet=FOLDER"),
        (["controlnet=net"], "add control=IMAGE.png"),
        (["control_edges=true"], "give control=PHOTO"),
        (["controlnet=nowhere", "control=photo.png"], "controlnet=nowhere: not found"),
        (["controlnet=net", "control=nowhere.png"], "control=nowhere.png: not found"),
        (["controlnet=net", "control=[photo.png,photo.png]"], "2 images for 1 prompts"),
        (["controlnet=net", "control=photo.png", "control_scale=-1"], "control_scale=-1"),
        (
            ["controlnet=net", "control=photo.png", "pretrained=tiny"],
            "give one for Stable Diffusion 1.x",
        ),
    ],
)
def test_a_wrong_control_setting_is_refused(
    checkpoint, controlnet, photo, tmp_path, monkeypatch, call, arguments, message
):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    shutil.copytree(controlnet, "net")
    status, _, error = call(predict_main, "prompt=x", f"pretrained={checkpoint}", "steps=1", *arguments)
    assert status == 1 and message in error and "Traceback" not in error
    assert not Path("outputs").exists()


def test_a_control_image_without_a_controlnet_is_refused_in_python(module, photo):
    with pytest.raises(SettingsError, match="control: needs a ControlNet"):
        module.infer(PROMPT, control=photo)
