"""Sampling: images equal those of diffusers, depend only on their seed, and errors name the cause."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from sdmodule.components.schedulers import CLASSES, SHORT_NAMES, make_scheduler
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPT = "a red circle on a blue background"
OTHER = "a small white star at the top on a green background"
LONG = " and ".join([PROMPT] * 12)  # more than 77 tokens
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def sd(checkpoint: Path) -> StableDiffusionModule:
    return StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 4})


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded: StableDiffusionPipeline, checkpoint: Path) -> StableDiffusionPipeline:
    loaded.scheduler = DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    return loaded


def sources(seed: int, count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def images(sd: StableDiffusionModule, *prompt, **settings) -> np.ndarray:
    return sd.infer(*prompt, return_type="numpy", **settings)["samples"]


def assert_same(images: np.ndarray, others: np.ndarray) -> None:
    """No value differs by more than one of 255 steps."""
    np.testing.assert_allclose(images, others, rtol=0, atol=1 / 255)


# ------------------------------------------------------------------------------------------ parity with diffusers


@pytest.mark.parametrize("scheduler", sorted(set(SHORT_NAMES) - {"ddpm"}))
def test_every_scheduler_samples_the_image_of_diffusers(sd, pipeline, scheduler):
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    theirs = pipeline(
        PROMPT, negative_prompt=OTHER, num_inference_steps=6, guidance_scale=7.5, generator=sources(3), output_type="np"
    ).images
    ours = images(sd, PROMPT, negative_prompt=OTHER, num_inference_steps=6, scheduler=scheduler, seed=3)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [{"eta": 0.5}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}, {"height": 48, "width": 24}],
    ids=lambda settings: "-".join(settings),
)
def test_settings_sample_the_images_of_diffusers(sd, pipeline, settings):
    settings = {"num_inference_steps": 5, **settings}
    generators = sources(5, settings.get("num_images_per_prompt", 1))
    theirs = pipeline(PROMPT, generator=generators, output_type="np", **settings).images
    assert np.array_equal(images(sd, PROMPT, seed=5, **settings), theirs)


def test_given_latents_and_generators_sample_the_images_of_diffusers(sd, pipeline):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    common = {"latents": latents, "eta": 0.5, "num_inference_steps": 5}
    theirs = pipeline([PROMPT, OTHER], generator=sources(7, 2), output_type="np", **common).images
    assert np.array_equal(images(sd, [PROMPT, OTHER], generator=sources(7, 2), **common), theirs)


def test_guidance_of_a_zero_terminal_snr_model_is_rescaled_as_in_diffusers(sd, pipeline):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **ZERO_SNR)
    theirs = pipeline(
        PROMPT, num_inference_steps=5, guidance_rescale=0.7, generator=sources(2), output_type="np"
    ).images
    ours = {"num_inference_steps": 5, "scheduler": {"name": "ddim", **ZERO_SNR}, "seed": 2}
    assert np.array_equal(images(sd, PROMPT, **ours), theirs)
    assert not np.array_equal(images(sd, PROMPT, **ours, guidance_rescale=0.0), theirs)


# ------------------------------------------------------------------------------------------ seeds and order


def test_an_image_does_not_depend_on_the_batch_size(sd):
    alone = [images(sd, PROMPT, seed=10 + k)[0] for k in range(3)]
    assert not np.allclose(alone[0], alone[1], atol=0.1)
    for count in (1, 2, 3):
        assert_same(images(sd, PROMPT, seed=10, num_images_per_prompt=count), alone[:count])


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
def test_an_image_does_not_depend_on_the_length_of_other_prompts(sd, scheduler):
    prompts = [LONG, PROMPT, LONG + " and a star", OTHER]
    together = sd.infer(prompts, scheduler=scheduler, seed=20, return_type="numpy")
    alone = [images(sd, prompt, scheduler=scheduler, seed=20 + k)[0] for k, prompt in enumerate(prompts)]
    assert_same(together["samples"], alone)
    assert together["prompts"] == prompts
    assert together["seeds"] == [20, 21, 22, 23]
    assert not np.array_equal(alone[0], images(sd, PROMPT, scheduler=scheduler, seed=20)[0]), (
        "a long prompt is read to its end"
    )


def test_images_are_ordered_by_prompt(sd):
    out = sd.infer([PROMPT, OTHER], num_images_per_prompt=2, seed=4, return_type="numpy")
    assert out["prompts"] == [PROMPT, PROMPT, OTHER, OTHER]
    assert_same(out["samples"][2:], images(sd, OTHER, num_images_per_prompt=2, seed=6))


def test_given_latents_stay_with_their_prompts_of_different_lengths(sd):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = images(sd, [PROMPT, LONG, OTHER], latents=latents)
    for k, prompt in enumerate([PROMPT, LONG, OTHER]):
        assert_same(together[k : k + 1], images(sd, prompt, latents=latents[k : k + 1]))


def test_sampling_is_repeatable_and_leaves_global_random_state_alone(sd):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = images(sd, [PROMPT, LONG], scheduler="euler_a", seed=8)
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]
    torch.manual_seed(2)
    assert np.array_equal(images(sd, [PROMPT, LONG], scheduler="euler_a", seed=8), first)


def test_one_generator_can_draw_all_images(sd):
    together = images(sd, PROMPT, generator=torch.Generator().manual_seed(9), num_images_per_prompt=2)
    assert_same(together[:1], images(sd, PROMPT, seed=9))
    assert not np.allclose(together[0], together[1], atol=0.1)


def test_each_prompt_may_have_its_own_negative_prompt(sd):
    together = images(sd, [PROMPT, PROMPT], negative_prompt=[OTHER, ""], seed=0)
    assert_same(together[:1], images(sd, PROMPT, negative_prompt=OTHER, seed=0))
    assert_same(together[1:], images(sd, PROMPT, seed=1))
    assert not np.allclose(together[0], images(sd, PROMPT, seed=0)[0], atol=1 / 255)


# ------------------------------------------------------------------------------------------ results


def test_return_types_hold_the_same_image(sd):
    image, array, tensor = (sd.infer(PROMPT, return_type=t, width=24)["samples"] for t in ("image", "numpy", "tensor"))
    assert isinstance(image[0], Image.Image) and image[0].size == (24, 32)
    assert array.shape == (1, 32, 24, 3) and tensor.shape == (1, 3, 32, 24)
    assert 0 <= array.min() < array.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(image[0]), (array[0] * 255).round().astype(np.uint8))


def test_metadata_holds_the_settings(sd, checkpoint):
    out = sd.infer(PROMPT, num_inference_steps=3, scheduler="euler", guidance_scale=4.0)
    assert out["metadata"] == {
        "steps": 3,
        "guidance_scale": 4.0,
        "guidance_rescale": 0.0,
        "eta": 0.0,
        "scheduler": "EulerDiscreteScheduler",
        "scheduler_settings": {},
        "height": 32,
        "width": 32,
        "model": str(checkpoint),
        "family": "Stable Diffusion 1.x and 2.x",
    }
    assert set(out["seconds"]) == {"text", "denoise", "decode"}


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        (PROMPT, {"num_inference_steps": 0}, ["steps=0"]),
        (PROMPT, {"num_inference_steps": -1}, ["steps=-1"]),
        (PROMPT, {"num_inference_steps": 1001}, ["steps=1001", "1000"]),
        (PROMPT, {"height": 33}, ["height=33", "32", "36"]),
        (PROMPT, {"width": 0}, ["width=0", "4"]),
        (PROMPT, {"eta": 1.5}, ["eta=1.5"]),
        (PROMPT, {"guidance_scale": float("nan")}, ["guidance_scale=nan"]),
        (PROMPT, {"guidance_rescale": -0.1}, ["guidance_rescale=-0.1"]),
        (PROMPT, {"scheduler": "dimm"}, ["scheduler=dimm", *SHORT_NAMES, *CLASSES]),
        (PROMPT, {"scheduler": {"name": "ddim", "karras": True}}, ["ddim", "karras", "timestep_spacing"]),
        (PROMPT, {"latents": torch.zeros(1, 4, 9, 8)}, ["(1, 4, 9, 8)", "(1, 4, 8, 8)"]),
        (PROMPT, {"latents": torch.zeros(2, 4, 8, 8)}, ["(2, 4, 8, 8)", "(1, 4, 8, 8)"]),
        ([PROMPT, OTHER], {"generator": sources(0, 3)}, ["generator", "3 entries", "2 images"]),
        ([PROMPT, OTHER], {"negative_prompt": [OTHER] * 3}, ["negative_prompt", "3", "2"]),
        ([], {}, ["prompt=[]"]),
        ([3], {}, ["prompt=[3]"]),
        (PROMPT, {"seed": -1}, ["seed=-1"]),
        (PROMPT, {"num_images_per_prompt": 0}, ["num_images_per_prompt=0"]),
        (PROMPT, {"return_type": "pil"}, ["return_type=pil", "image", "numpy", "tensor"]),
        (PROMPT, {"image": Image.new("RGB", (32, 32))}, ["image", "text"]),
        (PROMPT, {"mask": Image.new("L", (32, 32))}, ["mask", "text"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:30],
)
def test_bad_settings_are_named_in_the_error(sd, prompt, settings, words):
    with pytest.raises(SettingsError) as error:
        sd.infer(prompt, **settings)
    assert all(word in str(error.value) for word in words), error.value
