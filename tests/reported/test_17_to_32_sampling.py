"""Rows 17, 23, 26 to 32 and 38: middling and small faults in prompts, sampling and settings."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tomesd
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import ImageFont
from safetensors.torch import save_file

from sdmodule.components.checkpoint import load_components
from sdmodule.components.learned_words import add_word
from sdmodule.components.save import save_components
from sdmodule.conditioning.prompt_syntax import parse_weights
from sdmodule.conditioning.text import encode_prompts
from sdmodule.errors import SettingsError
from sdmodule.io.images import wrap_text
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.speed_settings import SpeedSettings
from sdmodule.speed.steps import plan_steps
from sdmodule.training.resume import find_checkpoint
from tests.pipelines import diffusers_pipeline
from tests.reported.drawing import ramp, strokes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPT = "a red circle"
FAST = {"num_inference_steps": 3, "show_progress": False, "return_type": "numpy"}


# ---------------------------------------------------------------------------------------------- row 17


@pytest.mark.parametrize("order", [("<style>", "<style>_1"), ("<style>_1", "<style>")])
@pytest.mark.parametrize("count", [1, 3])
def test_row_17_a_word_is_not_mixed_up_with_one_whose_name_begins_so(checkpoint, order, count):
    vectors = {name: torch.randn(count, 32, generator=torch.Generator().manual_seed(len(name))) for name in order}

    def encoded(prompt, *names):
        parts = load_components(str(checkpoint))
        for name in names:
            add_word(name, vectors[name], parts.tokenizer, parts.text_encoder)
        return encode_prompts([prompt], parts.tokenizer, parts.text_encoder)

    for name in order:
        prompt = f"a {name} b"
        assert torch.equal(encoded(prompt, *order), encoded(prompt, name))
    assert not torch.equal(encoded("a <style> b", *order), encoded("a <style>_1 b", *order))


def test_row_17_two_files_of_words(checkpoint, tmp_path):
    for k, name in enumerate(("<style>", "<style>_1")):
        save_file({name: torch.randn(1, 32, generator=torch.Generator().manual_seed(k))}, tmp_path / f"{k}.safetensors")
    files = [{"path": str(tmp_path / f"{k}.safetensors")} for k in range(2)]
    images = []
    for chosen in (files[:1], files, files[::-1]):
        module = StableDiffusionModule.from_pretrained(str(checkpoint), adapters=chosen)
        images.append(module.infer("a <style> b", **FAST)["samples"])
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])


# ---------------------------------------------------------------------------------------------- row 23


def test_row_23_a_caption_of_any_length_is_wrapped_at_once():
    font = ImageFont.load_default(12)
    start = time.perf_counter()
    for text in ("x" * 100_000, "x " * 50_000, "\u0301" * 20_000, "word " * 20_000):
        lines = wrap_text(text, font, 192)
        assert len(lines) <= 4 and all(font.getlength(line) <= 192 for line in lines)
    assert time.perf_counter() - start < 20, "it was cubic: 2,000 letters took three minutes"


def test_row_23_captions_are_wrapped_as_before():
    font = ImageFont.load_default(12)
    assert wrap_text("a red circle", font, 192) == ["a red circle"]
    assert wrap_text("", font, 192) == [""]
    assert "".join(wrap_text("abcdefghij" * 6, font, 100)) == "abcdefghij" * 6
    assert wrap_text("a " * 400, font, 100)[-1] == "…"


# ---------------------------------------------------------------------------------------------- rows 26 and 28


@pytest.fixture
def distilled(checkpoint, tmp_path):
    """A checkpoint whose UNet is told its guidance scale."""
    parts = load_components(str(checkpoint))
    torch.manual_seed(0)
    parts.unet = UNet2DConditionModel.from_config({**parts.unet.config, "time_cond_proj_dim": 16}).eval()
    save_components(parts, tmp_path / "distilled")
    return tmp_path / "distilled"


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_row_26_a_distilled_unet_is_told_its_guidance_scale(distilled, scale):
    module = StableDiffusionModule.from_pretrained(str(distilled))
    ours = module.infer(PROMPT, guidance_scale=scale, seed=3, **FAST)["samples"]
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 3, "guidance_scale": scale, "output_type": "np", "generator": generator}
    theirs = diffusers_pipeline(module.parts)(PROMPT, **settings).images
    assert np.array_equal(ours, theirs)
    other = module.infer(PROMPT, guidance_scale=scale + 3, seed=3, **FAST)["samples"]
    assert not np.array_equal(ours, other)


def test_row_28_steps_of_continuous_time_are_guided():
    plans = plan_steps([1.2e3, 900.0, 0.3, -0.1, -3.0], 1000, SpeedSettings(), guided=True)
    assert all(plan.guided for plan in plans)
    first = plan_steps([900.0, 0.3, -0.1], 1000, SpeedSettings(guidance_interval=(0.5, 1.0)), guided=True)
    assert [plan.guided for plan in first] == [True, False, False]


# ---------------------------------------------------------------------------------------------- row 27


@pytest.mark.parametrize("scheduler", [None, "euler_a", "ddpm"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_row_27_one_generator_for_several_images_equals_diffusers(module, scheduler, size):
    height, width = size
    common = {"height": height, "width": width, "num_inference_steps": 3}
    single = torch.Generator().manual_seed(5)
    ours = module.infer([PROMPT, "a star"], generator=single, scheduler=scheduler, **{**FAST, **common})["samples"]
    generator = torch.Generator().manual_seed(5)
    pipeline = diffusers_pipeline(module.parts, scheduler=scheduler)
    theirs = pipeline([PROMPT, "a star"], generator=generator, output_type="np", **common).images
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("scheduler", ["euler_a", "ddpm"])
def test_row_27_inpainting_with_noise_in_each_step_equals_diffusers(checkpoint, scheduler):
    module = StableDiffusionModule.from_pretrained(str(checkpoint), task="inpaint")
    photo, mask = ramp(size=(32, 32)), strokes((0, 0, 0), (255, 255, 255)).resize((32, 32))
    seeded = torch.Generator().manual_seed(5)
    ours = module.infer(PROMPT, photo, mask, generator=seeded, scheduler=scheduler, num_inference_steps=3)["samples"][0]
    pipeline = diffusers_pipeline(module.parts, StableDiffusionInpaintPipeline, scheduler)
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "generator": torch.Generator().manual_seed(5)}
    theirs = pipeline(PROMPT, image=photo, mask_image=mask, output_type="pil", strength=1.0, **settings).images[0]
    inside = np.asarray(mask.convert("L")) > 127
    assert np.array_equal(np.asarray(ours)[inside], np.asarray(theirs)[inside])


# ---------------------------------------------------------------------------------------------- rows 29 and 40


def test_row_29_numpy_scalars_are_numbers(module):
    sides = {"height": np.int64(32), "width": np.int32(24)}
    given = {"seed": np.int64(3), "guidance_scale": np.float32(3.5), "num_inference_steps": np.int16(2)}
    ours = module.infer(PROMPT, **{**FAST, **sides, **given})["samples"]
    plain = {"height": 32, "width": 24, "seed": 3, "guidance_scale": 3.5, "num_inference_steps": 2}
    assert np.array_equal(ours, module.infer(PROMPT, **{**FAST, **plain})["samples"])
    assert StableDiffusionModule.from_pretrained(module.parts.source, sampling={"height": np.int64(32)})


@pytest.mark.parametrize("form", ["tensor", "array", "list"])
def test_row_29_control_images_may_be_a_batch(checkpoint, tmp_path, form):
    from sdmodule.components.controlnet import controlnet_from_unet
    from sdmodule.components.save import save_model

    parts = load_components(str(checkpoint))
    net = controlnet_from_unet(parts)
    for weight in net.parameters():
        weight.data += 0.1
    save_model(net, tmp_path / "net")
    module = StableDiffusionModule(str(checkpoint), components={"controlnet": tmp_path / "net"})
    images = [ramp(k, (32, 32)) for k in (0, 3)]
    array = np.stack([np.asarray(image) for image in images])
    given = {"list": images, "array": array, "tensor": torch.from_numpy(array).permute(0, 3, 1, 2)}[form]
    wanted = module.infer([PROMPT, "a star"], control=images, **FAST)["samples"]
    assert np.array_equal(module.infer([PROMPT, "a star"], control=given, **FAST)["samples"], wanted)
    with pytest.raises(SettingsError, match=r"controlnet=\[1\]: must be one path or hub id"):
        StableDiffusionModule(str(checkpoint), components={"controlnet": [1]})


def test_row_40_images_as_the_model_has_them_and_diffusers_name_of_the_mask(checkpoint):
    module = StableDiffusionModule.from_pretrained(checkpoint, task="inpaint")
    photo, mask = ramp(size=(32, 32)), strokes((0, 0, 0), (255, 255, 255)).resize((32, 32))
    wanted = module.infer(PROMPT, photo, mask, **FAST)["samples"]
    tensor = torch.from_numpy(np.asarray(photo) / 127.5 - 1).permute(2, 0, 1)
    assert np.array_equal(module.infer(PROMPT, tensor, mask_image=mask, **FAST)["samples"], wanted)
    with pytest.raises(SettingsError, match="two names of one argument"):
        module.infer(PROMPT, photo, mask, mask_image=mask)


def test_a_return_type_is_checked_before_sampling(module):
    with pytest.raises(SettingsError, match="return_type=pil: unknown; choose one of image, latent, numpy, tensor"):
        module.infer(PROMPT, num_inference_steps=900, return_type="pil")


def test_a_typo_in_inpaint_is_named(checkpoint):
    module = StableDiffusionModule.from_pretrained(str(checkpoint), task="inpaint")
    with pytest.raises(SettingsError, match=r"inpaint\.strenght: unknown; inpaint has mask_blur"):
        module.infer(PROMPT, ramp(), [0, 0, 9, 9], inpaint={"strenght": 1})


# ---------------------------------------------------------------------------------------------- rows 30 to 32, 38


def test_row_30_a_unet_that_tomesd_has_patched_is_not_merged_twice(module):
    wanted = module.infer(PROMPT, tome={"ratio": 0.5}, **FAST)["samples"]
    tomesd.apply_patch(module.unet, ratio=0.5)
    with pytest.raises(SettingsError, match=r"patched by tomesd already; call tomesd\.remove_patch"):
        module.infer(PROMPT, tome={"ratio": 0.5}, **FAST)
    module.infer(PROMPT, **FAST)  # with tomesd alone, as asked
    tomesd.remove_patch(module.unet)
    assert np.array_equal(module.infer(PROMPT, tome={"ratio": 0.5}, **FAST)["samples"], wanted)


@pytest.mark.parametrize("prompt", ["((((((a:9):9):9):9):9):9)", "((a:4):4)", "(b (a:3.2):3.2)", "(a:11)"])
def test_row_31_the_product_of_nested_weights_has_the_limit_of_one(prompt):
    with pytest.raises(SettingsError, match="must be from 0 to 10"):
        parse_weights(prompt)


def test_row_31_products_within_the_limit_are_weights():
    assert parse_weights("((a:4):2.5)") == [("a", 10.0)] and parse_weights("((a:9):0.5)") == [("a", 4.5)]


def test_row_32_eta_that_has_no_effect_is_refused(module):
    with pytest.raises(SettingsError, match=r"eta=0\.5: has no effect with EulerAncestralDiscreteScheduler; use"):
        module.infer(PROMPT, scheduler="euler_a", eta=0.5, **FAST)
    assert module.infer(PROMPT, scheduler="ddim", eta=0.5, **FAST)["samples"].shape == (1, 32, 32, 3)


def test_row_38_auto_is_the_newest_whole_checkpoint_or_a_fresh_start(tmp_path):
    assert find_checkpoint("auto", tmp_path, 10) is None
    place = tmp_path / "checkpoints"
    place.mkdir()
    (place / "step=3.ckpt").write_bytes(b"cut")
    assert find_checkpoint("auto", tmp_path, 10) is None
    held = {"global_step": 2, "state_dict": {}, "loops": {}, "callbacks": {}, "optimizer_states": []}
    torch.save(held, place / "step=2.ckpt")
    assert find_checkpoint("auto", tmp_path, 10) == str(place / "step=2.ckpt")
