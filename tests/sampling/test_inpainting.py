"""Inpainting: diffusers' pixels inside the mask, an untouched image outside it, and errors that name the cause."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from sdmodule.components.inpaint_unet import convert_to_inpaint
from sdmodule.conditioning.inpaint_crop import InpaintSettings
from sdmodule.errors import SettingsError
from sdmodule.io.transparency import on_white
from sdmodule.module import StableDiffusionModule
from sdmodule.sampling.conditions import Given
from sdmodule.sampling.pipeline import sample
from sdmodule.sampling.requests import build_requests
from tests.pipelines import diffusers_pipeline


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPT = "a blue star on a white background"
BOX = (8, 4, 24, 20)


def photo(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def box_mask(width: int = 32, height: int = 32, box: tuple[int, int, int, int] = BOX) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@pytest.fixture(scope="module", params=[4, 9], ids=["4 channels", "9 channels"])
def sd(request, checkpoint: Path) -> StableDiffusionModule:
    module = StableDiffusionModule.from_pretrained(str(checkpoint), task="inpaint", sampling={"steps": 4})
    if request.param == 9:
        convert_to_inpaint(module.unet)
        with torch.no_grad():  # as if trained, so that the new channels matter
            generator = torch.Generator().manual_seed(0)
            new = module.unet.conv_in.weight[:, 4:]
            new.copy_(torch.randn(new.shape, generator=generator) * 0.1)
    return module


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("scheduler", [None, "euler_a", "ddpm", "dpmpp_2m"])
def test_the_masked_area_equals_that_of_diffusers(sd, strength, scheduler):
    parts = sd.parts
    requests = build_requests(PROMPT, image=photo(), mask=box_mask(), task="inpaint")
    settings = sd.sampling.updated(scheduler=scheduler, steps=6, inpaint=InpaintSettings(strength=strength))
    ours = sample(parts, requests, settings, Given(generators=[torch.Generator().manual_seed(5)])).decoded
    pipeline = diffusers_pipeline(parts, StableDiffusionInpaintPipeline, scheduler)
    theirs = pipeline(
        PROMPT,
        image=photo(),
        mask_image=box_mask(),
        height=32,
        width=32,
        num_inference_steps=6,
        strength=strength,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), theirs)


@pytest.mark.parametrize("size", [(32, 32), (101, 70), (40, 110)])
@pytest.mark.parametrize("settings", [{}, {"only_masked": True, "padding": 5}, {"mask_blur": 2.0}, {"strength": 0.5}])
def test_every_pixel_outside_the_mask_is_unchanged(sd, size, settings):
    before, mask = photo(*size), box_mask(*size)
    result = sd.infer(PROMPT, before, mask, inpaint=settings)["samples"][0]
    assert result.size == size
    changed = (np.asarray(result) != np.asarray(before)).any(axis=2)
    reach = 0 if "mask_blur" not in settings else 8
    x0, y0, x1, y1 = BOX
    allowed = np.zeros(changed.shape, dtype=bool)
    allowed[max(y0 - reach, 0) : y1 + reach, max(x0 - reach, 0) : x1 + reach] = True
    assert changed[allowed].mean() > 0.3
    assert not changed[~allowed].any()


def test_only_masked_gives_the_masked_area_more_detail(sd):
    """Without it, a mask 32 pixels wide in an image of 320 is 3 pixels wide at the model's 32."""
    before, mask = photo(320, 320), box_mask(320, 320, (40, 40, 72, 72))
    coarse = sd.infer(PROMPT, before, mask)["samples"][0].crop((40, 40, 72, 72))
    fine = sd.infer(PROMPT, before, mask, inpaint={"only_masked": True, "padding": 0})["samples"][0]
    detail = [
        np.abs(np.diff(np.asarray(im, dtype=float), axis=1)).mean() for im in (coarse, fine.crop((40, 40, 72, 72)))
    ]
    assert detail[1] > detail[0]


def test_every_form_of_image_and_mask_gives_the_same_result(sd, tmp_path):
    before, mask = photo(), box_mask()
    before.save(tmp_path / "photo, of ${x}.png")
    mask.save(tmp_path / "mask.png")
    transparent = before.copy()
    transparent.putalpha(mask.point(lambda value: 255 - value))
    array, white = np.asarray(before), np.asarray(mask)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [
        (str(tmp_path / "photo, of ${x}.png"), tmp_path / "mask.png"),
        (array, white),
        (array / 255.0, white > 0),
        (tensor, torch.from_numpy(white.copy())[None]),
        (tensor[None] / 255, torch.from_numpy(white / 255.0)),
        (before, list(BOX)),
    ]
    wanted = np.asarray(sd.infer(PROMPT, before, mask)["samples"][0])
    for image, form in forms:
        assert np.array_equal(np.asarray(sd.infer(PROMPT, image, form)["samples"][0]), wanted)
    wanted = np.asarray(sd.infer(PROMPT, on_white(transparent), mask)["samples"][0])
    assert np.array_equal(np.asarray(sd.infer(PROMPT, transparent, "alpha")["samples"][0]), wanted)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), array)  # the caller's arrays are not modified


def test_one_image_for_many_prompts_and_one_prompt_for_many_images(sd):
    first, second = photo(seed=1), photo(seed=2)
    one = sd.infer(PROMPT, [first, second], box_mask(), return_type="numpy")
    assert one["prompts"] == [PROMPT] * 2
    many = sd.infer([PROMPT, "a red circle"], first, box_mask(), return_type="numpy")
    assert np.array_equal(one["samples"][0], many["samples"][0])
    kept = (many["samples"][1] * 255).round()[BOX[3] :]
    assert np.array_equal(kept, np.asarray(first)[BOX[3] :])
    with pytest.raises(SettingsError, match="2 entries for 3 prompts"):
        sd.infer([PROMPT] * 3, [first, second], box_mask())


def test_a_mask_of_the_whole_image_works_and_is_reported(sd, capfd, caplog):
    with caplog.at_level("INFO"):
        sd.infer(PROMPT, photo(), [0, 0, 32, 32])
    assert "covers the whole image" in caplog.text + capfd.readouterr().err


def test_the_metadata_names_the_inpainting_method(sd):
    method = "9 channels" if sd.unet.config.in_channels == 9 else "known region re-noised at every step"
    assert sd.infer(PROMPT, photo(), box_mask())["metadata"]["inpaint"] == method


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (photo(), box_mask(16, 16), "mask: is 16x16 pixels and image is 32x32"),
        (photo(), Image.new("L", (32, 32)), "mask: is empty"),
        (photo(), None, "mask: missing"),
        (photo().convert("RGBA"), None, "mask=alpha"),
        (photo(), "alpha", "image has no transparency"),
        (photo(), [0, 0, 33, 10], "within the image of 32x32"),
        (photo(), [0, 0, 10], "four whole numbers"),
        (None, box_mask(), "needs an image"),
        ("missing.png", box_mask(), "image=missing.png: not found"),
        (__file__, box_mask(), "cannot be read as an image"),
        (np.full((32, 32, 3), 2.0), box_mask(), "values from 2 to 2"),
        (np.zeros((32, 32, 7)), box_mask(), r"the shape \(32, 32, 7\)"),
        (7, box_mask(), "is of type int"),
    ],
)
def test_bad_images_and_masks_are_named_in_the_error(sd, image, mask, message):
    with pytest.raises(SettingsError, match=message):
        sd.infer(PROMPT, image, mask)


@pytest.mark.parametrize(
    "settings",
    [{"strength": 0}, {"strength": 1.5}, {"strength": 0.01}, {"padding": -1}, {"mask_blur": -1}, {"only_masked": 1}],
)
def test_inpainting_settings_out_of_range_are_refused(sd, settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        sd.infer(PROMPT, photo(), box_mask(), inpaint=settings)


def test_a_mask_that_vanishes_at_the_models_resolution_is_refused(sd):
    speck = box_mask(1000, 1000, (501, 501, 503, 503))
    with pytest.raises(SettingsError, match="only_masked=true"):
        sd.infer(PROMPT, photo(1000, 1000), speck)
    assert sd.infer(PROMPT, photo(1000, 1000), speck, inpaint={"only_masked": True, "padding": 0})["samples"]


def test_exif_orientation_of_an_image_is_applied(sd, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo(40, 60).save(tmp_path / "photo.png", exif=exif)
    assert sd.infer(PROMPT, tmp_path / "photo.png", box_mask(60, 40))["samples"][0].size == (60, 40)


def test_a_prompts_own_seed_counts_up_over_many_images(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a star", "seed": 7}')
    images = [photo(), photo(seed=1)]
    requests = build_requests(
        prompts=str(tmp_path / "prompts.jsonl"), num_images_per_prompt=2, image=images, mask=box_mask(), task="inpaint"
    )
    assert [request.seed for request in requests] == [7, 8, 9, 10]


def test_text2image_refuses_inpainting_settings(checkpoint):
    module = StableDiffusionModule.from_pretrained(str(checkpoint))
    with pytest.raises(SettingsError, match=r"strength=0\.5: no effect with model=text2image"):
        module.infer(PROMPT, inpaint={"strength": 0.5})


def test_text2image_refuses_a_mask(checkpoint):
    module = StableDiffusionModule.from_pretrained(str(checkpoint))
    with pytest.raises(SettingsError, match="model=text2image"):
        module.infer(PROMPT, mask=box_mask())


def test_text2image_refuses_an_inpainting_unet(checkpoint, tmp_path):
    module = StableDiffusionModule.from_pretrained(str(checkpoint))
    convert_to_inpaint(module.unet)
    module.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="use model=inpaint"):
        StableDiffusionModule.from_pretrained(str(tmp_path))
