"""Image-to-image equals the pipelines of diffusers for both families, pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

from sdmodule.components.schedulers import SHORT_NAMES, make_scheduler
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from tests.peers.test_diffusers import generators, grid
from tests.pipelines import diffusers_pipeline
from tests.reported.drawing import ramp
from tests.xl_parts import xl_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPTS = ["a red circle on a blue background", "a star"]


@pytest.fixture(scope="module", params=["1.x", "XL"])
def both(request, checkpoint, xl_checkpoint):
    """The module of a family, and its pipeline of diffusers."""
    if request.param == "XL":
        module = StableDiffusionModule.from_pretrained(xl_checkpoint, task="image2image")
        return module, xl_pipeline(xl_checkpoint, kind=StableDiffusionXLImg2ImgPipeline)
    module = StableDiffusionModule.from_pretrained(checkpoint, task="image2image")
    return module, diffusers_pipeline(module.parts, StableDiffusionImg2ImgPipeline)


@pytest.mark.parametrize(
    ("scheduler", "strength", "steps", "guidance", "generator"),
    grid(list(SHORT_NAMES), [1.0, 0.6, 0.3], [4, 7], [1.0, 4.0], ["one", "each"]),
)
def test_an_image_becomes_another(both, scheduler, strength, steps, guidance, generator):
    module, pipeline = both
    photo = ramp(size=(32, 32))
    common = {"num_inference_steps": steps, "guidance_scale": guidance, "strength": strength}
    ours = module.infer(
        PROMPTS,
        photo,
        generator=generators(generator),
        scheduler=scheduler,
        return_type="numpy",
        show_progress=False,
        **common,
    )["samples"]
    pipeline.scheduler = make_scheduler(scheduler, module.parts.scheduler.config)
    theirs = pipeline(PROMPTS, image=[photo] * 2, generator=generators(generator), output_type="np", **common).images
    assert np.array_equal(ours, theirs)


def test_the_usual_strength_is_that_of_diffusers_for_1x(both):
    module, pipeline = both
    pipeline.scheduler = make_scheduler(None, module.parts.scheduler.config)
    common = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0)}
    ours = module.infer(PROMPTS[0], ramp(size=(32, 32)), return_type="numpy", show_progress=False, **common)
    common["generator"].manual_seed(0)
    theirs = pipeline(PROMPTS[0], image=ramp(size=(32, 32)), strength=0.8, output_type="np", **common).images
    assert np.array_equal(ours["samples"], theirs)


def test_an_image_keeps_its_shape_at_the_models_number_of_pixels_and_batches_do_not_change_it(both):
    module, _ = both
    photos = [ramp(size=(64, 64)), ramp(1, (40, 160)), ramp(2, (200, 100))]
    options = {"num_inference_steps": 3, "show_progress": False}
    together = module.infer("a star", photos, seed=3, **options)["samples"]
    assert [image.size for image in together] == [(32, 32), (16, 64), (44, 24)]
    alone = module.infer("a star", photos[2], seed=5, **options)["samples"][0]
    assert np.array_equal(np.asarray(alone), np.asarray(together[2]))
    wide = module.infer("a star", photos[2], width=32, **options)["samples"][0]
    assert wide.size == (32, 16)


def test_a_mask_keeps_the_rest_of_the_image(both):
    module, _ = both
    photo = ramp(size=(32, 32))
    made = module.infer("a star", photo, [8, 8, 24, 24], num_inference_steps=4, strength=0.6, show_progress=False)
    kept = np.ones((32, 32), dtype=bool)
    kept[8:24, 8:24] = False
    pixels = np.asarray(made["samples"][0])
    assert np.array_equal(pixels[kept], np.asarray(photo)[kept]) and not np.array_equal(pixels, np.asarray(photo))
    inpainted = StableDiffusionModule.from_pretrained(module.parts.source, task="inpaint")
    again = inpainted.infer("a star", photo, [8, 8, 24, 24], num_inference_steps=4, strength=0.6, show_progress=False)
    assert np.array_equal(pixels, np.asarray(again["samples"][0]))


def test_bad_input(both):
    module, _ = both
    photo = ramp(size=(32, 32))
    for options, words in (
        ({}, "model=image2image: needs an image to start from"),
        ({"image": photo, "strength": 0}, "strength=0: must be a number greater than 0 and of at most 1"),
        ({"image": photo, "strength": 0.1}, "strength=0.1: leaves no step of steps=4"),
        ({"image": [photo] * 3}, "image: 3 images for 2 prompts"),
        ({"image": torch.zeros(1, 4, 8, 8), "height": 64, "width": 64}, "give .*4, 16, 16"),
    ):
        with pytest.raises(SettingsError, match=words):
            module.infer(PROMPTS, num_inference_steps=4, show_progress=False, **options)
