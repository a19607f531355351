"""Speed settings: equal images where that is promised, and an unchanged model afterwards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from sdmodule.module import StableDiffusionModule
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.cpu.layers import FastestConv2d
from sdmodule.speed.cpu.prepacked import supports_prepacking
from sdmodule.speed.speed_settings import SpeedSettings

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def sd(checkpoint) -> StableDiffusionModule:
    return StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 6, "guidance_scale": 5.0})


def images(sd, *prompt, **settings):
    return sd.infer(*(prompt or (PROMPT,)), return_type="numpy", **settings)["samples"]


@pytest.mark.parametrize("same", [{"guidance_interval": [0, 1]}, {"cache_every": 1}, {"keep_memory": True}])
def test_settings_that_change_no_bit(sd, same):
    assert np.array_equal(images(sd, speed=same), images(sd))


CLOSE = [
    {"channels_last": True},
    {"decode": "sliced"},
    {"attention": "plain"},
    {"attention": "math"},
    {"kernels": "fastest"},
]


@pytest.mark.parametrize("close", CLOSE, ids=str)
def test_settings_that_change_rounding_only(sd, close):
    assert np.abs(images(sd, speed=close) - images(sd)).max() < 2 / 255


def test_auto_takes_channels_last_where_it_is_faster(sd):
    settings = SpeedSettings(channels_last="auto")
    assert settings.channels_last_in(torch.bfloat16, "cpu") and settings.channels_last_in(torch.float16, "cuda")
    assert np.array_equal(images(sd, speed={"channels_last": "auto"}), images(sd))
    for more, device, expected in (({}, "cpu", True), ({}, "cuda", False), ({"compile": "blocks"}, "cpu", False)):
        settings = SpeedSettings(channels_last="auto", kernels="fastest", **more)
        assert settings.channels_last_in(torch.float32, device) == expected


@pytest.mark.skipif(not supports_prepacking(torch.float32), reason="oneDNN is not in this build of torch")
def test_the_vae_has_the_fastest_convolutions_in_float32_only(sd):
    parts, settings = copy.deepcopy(sd.parts), SpeedSettings(kernels="fastest")

    def swapped():
        return [layer for layer in parts.vae.modules() if isinstance(layer, FastestConv2d)]

    with apply_speed(parts, settings):
        assert swapped()
    assert not swapped()
    parts.vae.bfloat16()
    with apply_speed(parts, settings):
        assert not swapped()


LOSSY = [
    {"guidance_interval": [0.3, 0.8]},
    {"cache_every": 2},
    {"cache_every": 3, "cache_layers": 2, "guidance_interval": [0.0, 0.6]},
]


@pytest.mark.parametrize("speed", LOSSY)
@pytest.mark.parametrize("tome", [{}, {"ratio": 0.5, "reuse_steps": 2}, {"engine": "tomesd"}], ids=str)
def test_settings_that_change_images_do_not_depend_on_the_batch(sd, speed, tome):
    together = images(sd, [PROMPT, "a star"], speed=speed, tome=tome, seed=3)
    assert np.abs(images(sd, "a star", speed=speed, tome=tome, seed=4)[0] - together[1]).max() < 2 / 255
    assert not np.allclose(together, images(sd, [PROMPT, "a star"], tome=tome, seed=3), atol=1e-3)


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "euler_a", "unipc"])
def test_every_sampler_works_with_them(sd, scheduler):
    assert np.isfinite(images(sd, scheduler=scheduler, speed=LOSSY[2])).all()


def test_outside_the_interval_there_is_no_guidance(sd):
    never = images(sd, speed={"guidance_interval": [0.9999, 1.0]})
    assert np.abs(never - images(sd, guidance_scale=1.0)).max() < 2 / 255


def test_inpainting_works_with_them(checkpoint):
    inpainter = StableDiffusionModule.from_pretrained(str(checkpoint), task="inpaint", sampling={"steps": 4})
    photo = Image.new("RGB", (32, 32), "red")
    image = inpainter.infer(PROMPT, photo, [0, 0, 16, 16], speed=LOSSY[2])["samples"][0]
    assert image.getpixel((30, 30)) == (255, 0, 0) and image.getpixel((4, 4)) != (255, 0, 0)


def test_the_model_is_restored_afterwards(sd):
    before = images(sd)
    strides = {name: weight.stride() for name, weight in sd.named_parameters()}
    everything = {"channels_last": True, "attention": "plain", "keep_memory": True, "cache_every": 2}
    everything |= {"decode": "tiled", "kernels": "fastest"}
    images(sd, speed=everything)
    with pytest.raises(RuntimeError, match="stop"):
        sd.infer(PROMPT, speed=everything, generator=Stop())
    assert {name: weight.stride() for name, weight in sd.named_parameters()} == strides
    assert {type(part).__module__.partition(".")[0] for part in sd.unet.modules()} <= {"torch", "diffusers"}
    assert not any("forward" in vars(part) for part in sd.unet.modules())
    assert not sd.vae.use_tiling and not sd.vae.use_slicing
    assert np.array_equal(images(sd), before)


class Stop(list):
    """Generators that fail once sampling has begun."""

    def __init__(self):
        super().__init__([None])

    def __getitem__(self, index):
        raise RuntimeError("stop")


@pytest.mark.slow
@pytest.mark.parametrize(("compile", "speed"), [("blocks", {}), ("whole", {"cache_every": 2})])
def test_a_compiled_model_gives_the_same_and_is_eager_afterwards(few_blocks, monkeypatch, tmp_path, compile, speed):
    """Traced only: compiling to machine code takes a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sdmodule.speed.compile.BACKEND", "eager")
    torch._dynamo.reset()
    sd = few_blocks
    before = images(sd, speed=speed)
    assert np.abs(images(sd, speed={**speed, "compile": compile}) - before).max() < 2 / 255
    assert all(part._compiled_call_impl is None for part in sd.unet.modules())
    assert np.array_equal(images(sd, speed=speed), before)
