"""Image-to-image, a second larger pass, the refiner and several ControlNets from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sdmodule.cli.main import predict_main, train_main
from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.save import save_components, save_model
from sdmodule.module import StableDiffusionModule
from tests.cli.test_commands import records, told
from tests.reported.drawing import ramp
from tests.xl_parts import tiny_refiner_parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def album(tmp_path):
    """A folder of three images of different shapes."""
    folder = tmp_path / "album"
    folder.mkdir()
    for name, image in (("b", ramp(1, (64, 64))), ("a", ramp(2, (96, 48))), ("c", ramp(3, (64, 64)))):
        image.save(folder / f"{name}.png")
    return folder


def test_a_folder_of_images_is_made_made_again_and_resumed(call, checkpoint, album, tmp_path):
    out = tmp_path / "out"
    common = ["model=image2image", "prompt=a red star", "steps=3", f"pretrained={checkpoint}", f"image={album}"]
    status, printed, complaint = call(predict_main, *common, f"output_dir={out}")
    assert status == 0, complaint
    found = records(out)
    assert [Image.open(out / record["file"]).size for record in found] == [(44, 24), (32, 32), (32, 32)]  # by name
    assert {record["strength"] for record in found} == {0.8}
    sd = StableDiffusionModule.from_pretrained(checkpoint, task="image2image")
    alone = sd.infer("a red star", album / "a.png", num_inference_steps=3, scheduler="ddim", show_progress=False)
    assert np.array_equal(np.asarray(alone["samples"][0]), pixels(out / found[0]["file"]))

    again = tmp_path / "again"
    assert call(predict_main, f"from={out / found[0]['file']}", f"output_dir={again}")[0] == 0
    assert np.array_equal(pixels(again / records(again)[0]["file"]), pixels(out / found[0]["file"]))
    (out / found[1]["file"]).unlink()
    status, printed, complaint = call(predict_main, *common, f"output_dir={out}", "resume=true")
    assert status == 0 and "2 of 3 images are there" in printed, complaint
    for file in (out / "inputs").iterdir():
        file.unlink()
    told(call(predict_main, f"from={out / found[0]['file']}"), "add image=")


def test_hires_samples_at_twice_the_size_and_again_from_the_image(call, checkpoint, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    common = ["prompt=a red star", "steps=4", f"pretrained={checkpoint}", "hires=2", "sampler.hires_upscale=latents"]
    status, _, complaint = call(predict_main, *common, f"output_dir={out}")
    assert status == 0, complaint
    [record] = records(out)
    assert Image.open(out / record["file"]).size == (64, 64)
    assert (record["height"], record["hires"], record["hires_strength"]) == (32, 2.0, 0.5)
    assert call(predict_main, f"from={out / record['file']}", f"output_dir={again}")[0] == 0
    assert np.array_equal(pixels(again / records(again)[0]["file"]), pixels(out / record["file"]))


@pytest.mark.parametrize("upscale", ["image", "latents"])
def test_an_image_of_two_passes_depends_on_its_own_seed_and_counts_all_steps(checkpoint, upscale):
    sd = StableDiffusionModule.from_pretrained(checkpoint)
    steps = []
    options = {"num_inference_steps": 4, "hires": 1.5, "hires_upscale": upscale, "show_progress": False}
    both = sd.infer(["a star", "a circle"], callback_on_step_end=lambda step, _: steps.append(step), **options)
    assert steps == [1, 2, 3, 4, 5, 6] and both["samples"][0].size == (48, 48)
    alone = sd.infer("a circle", seed=1, **options)["samples"][0]
    difference = np.abs(np.asarray(alone).astype(int) - np.asarray(both["samples"][1]).astype(int))
    assert difference.max() <= 1


def test_a_larger_pass_keeps_the_layout():
    sd = StableDiffusionModule.from_pretrained("tiny")
    options = {"num_inference_steps": 8, "show_progress": False}
    plain, other = sd.infer("a red circle on a blue background", num_images_per_prompt=2, **options)["samples"]
    large = sd.infer("a red circle on a blue background", hires=2, hires_strength=0.3, **options)["samples"][0]
    shrunk, plain, other = (
        np.asarray(image.resize(plain.size, Image.Resampling.BOX)).astype(int) for image in (large, plain, other)
    )
    assert np.abs(shrunk - plain).mean() < 0.5 * np.abs(shrunk - other).mean()


def test_a_refiner_and_a_second_prompt(call, xl_checkpoint, tmp_path):
    torch.manual_seed(0)
    save_components(
        tiny_refiner_parts(StableDiffusionModule.from_pretrained(xl_checkpoint).parts), tmp_path / "refiner"
    )
    common = ["prompt=a star", "prompt_2=a circle", "steps=4", f"pretrained={xl_checkpoint}"]
    refined = [*common, f"refiner={tmp_path / 'refiner'}", "refiner_start=0.5", "sampler.original_size=[16,16]"]
    assert call(predict_main, *common, f"output_dir={tmp_path / 'plain'}")[0] == 0
    status, _, complaint = call(predict_main, *refined, f"output_dir={tmp_path / 'out'}")
    assert status == 0, complaint
    [image] = (tmp_path / "out" / "images").glob("*.png")
    assert call(predict_main, f"from={image}", f"output_dir={tmp_path / 'again'}")[0] == 0
    plain, again = (tmp_path / name / "images" / image.name for name in ("plain", "again"))
    assert np.array_equal(pixels(image), pixels(again)) and not np.array_equal(pixels(image), pixels(plain))
    text = Image.open(image).text
    assert text["prompt_2"] == "a circle" and json.loads(text["original_size"]) == [16, 16]


def test_two_controlnets(call, checkpoint, tmp_path):
    parts = StableDiffusionModule.from_pretrained(checkpoint).parts
    for seed in (0, 1):
        net = controlnet_from_unet(parts)
        generator = torch.Generator().manual_seed(seed)
        for weight in net.parameters():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        save_model(net, tmp_path / f"net{seed}")
        ramp(seed, (32, 32)).save(tmp_path / f"control{seed}.png")
    common = [
        *("prompt=a star", "steps=2", f"pretrained={checkpoint}"),
        f"controlnet=[{tmp_path / 'net0'},{tmp_path / 'net1'}]",
        f"control=[{tmp_path / 'control0.png'},{tmp_path / 'control1.png'}]",
        *("control_scale=[0.5,0.9]", "sampler.control_guidance_end=[0.5,1.0]"),
    ]
    status, _, complaint = call(predict_main, *common, f"output_dir={tmp_path / 'out'}")
    assert status == 0, complaint
    [image] = (tmp_path / "out" / "images").glob("*.png")
    status, _, complaint = call(predict_main, f"from={image}", f"output_dir={tmp_path / 'again'}")
    assert status == 0, complaint
    assert np.array_equal(pixels(image), pixels(tmp_path / "again" / "images" / image.name))


def test_what_does_not_go_together_is_said_before_anything_is_written(call, checkpoint, album, photos, tmp_path):
    out = f"output_dir={tmp_path / 'out'}"
    common = ["prompt=a", f"pretrained={checkpoint}", out]
    told(call(predict_main, *common, "model=image2image"), "needs an image to start from; give image=")
    told(
        call(predict_main, *common, "model=image2image", f"image={album}", "strength=0"), "strength=0", "greater than 0"
    )
    told(call(predict_main, *common, f"image={album}"), "use model=inpaint or model=image2image")
    told(call(predict_main, *common, "prompt_2=b"), "prompt_2: is for a second text encoder")
    told(call(predict_main, *common, "sampler.target_size=[32,32]"), "target_size: no effect with Stable Diffusion 1.x")
    told(call(predict_main, *common, "hires=0.5"), "hires=0.5: must be a number of at least 1")
    told(call(predict_main, *common, "model=image2image", "image=empty", "strength=0.5"), "image=empty: not found")
    (tmp_path / "empty").mkdir()
    told(call(predict_main, *common, "model=image2image", f"image={tmp_path / 'empty'}"), "contains no images")
    data = [f"data.root={photos}", "trainer.max_steps=1"]
    told(
        call(train_main, f"pretrained={checkpoint}", *data, "model=image2image", out), "model=image2image", "text2image"
    )
    assert not (tmp_path / "out").exists()
