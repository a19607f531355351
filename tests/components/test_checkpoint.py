"""Checkpoints load completely or fail with one sentence, and what is saved loads in diffusers."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from sdmodule.components.checkpoint import Components, load_components, load_part
from sdmodule.components.save import save_components, save_part
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import STABLE_DIFFUSION
from sdmodule.module import StableDiffusionModule

MODELS = ("unet", "vae", "text_encoder")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def parts(checkpoint: Path) -> Components:
    return load_components(str(checkpoint))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture
def other_weights(copy: Path) -> Path:
    """A checkpoint of the same architecture with other weights."""
    torch.manual_seed(1234)  # other weights than the checkpoint's, whatever was drawn before
    save_components(load_components(str(copy), scratch=MODELS), copy)
    return copy


def equal(part: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights, others = part.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def message(*arguments, **settings) -> str:
    with pytest.raises(SettingsError) as error:
        load_components(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("pretrained", ["tinny", "models/sd/v1", "../nowhere"])
def test_an_unknown_name_lists_what_is_allowed(pretrained):
    text = message(pretrained)
    assert f"pretrained={pretrained}" in text and "tiny" in text and ".safetensors" in text


def test_a_missing_single_file_is_named():
    assert "pretrained=nowhere/model.safetensors: not found" in message("nowhere/model.safetensors")


def test_a_folder_without_an_index_is_refused(copy):
    (copy / "model_index.json").unlink()
    text = message(str(copy))
    assert str(copy) in text and "model_index.json" in text


@pytest.mark.parametrize("part", STABLE_DIFFUSION.parts)
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    text = message(str(copy))
    assert f"the part {part} is missing" in text and str(copy / part) in text and f"components.{part}" in text


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("left", [0, 1000])
def test_a_truncated_download_names_its_part(copy, file, left):
    (copy / file).write_bytes((copy / file).read_bytes()[:left])
    assert f"pretrained={copy}: the part {Path(file).parent} cannot be read" in message(str(copy))


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", "vae/config.json", "text_encoder/model.safetensors"])
def test_a_missing_file_names_its_part(copy, file):
    (copy / file).unlink()
    assert f"pretrained={copy}: the part {Path(file).parent} cannot be read" in message(str(copy))


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "unet/config.json"])
@pytest.mark.parametrize("text", ["{", "", "[]"])
def test_a_corrupt_config_names_its_part(copy, file, text):
    (copy / file).write_text(text)
    assert f"pretrained={copy}: the part {Path(file).parent} cannot be read" in message(str(copy))


def test_without_a_network_a_hub_id_suggests_a_folder():
    text = message("owner/name")
    assert "pretrained=owner/name" in text and "pretrained=/path" in text


@pytest.mark.parametrize("settings", [{"components": {"encoder": "tiny"}}, {"scratch": ["encoder"]}])
def test_an_unknown_part_lists_the_parts(checkpoint, settings):
    text = message(str(checkpoint), **settings)
    assert f"{next(iter(settings))}=encoder: unknown" in text and all(part in text for part in STABLE_DIFFUSION.parts)


# ------------------------------------------------------------------------------------------ replaced parts


def test_a_part_can_come_from_another_checkpoint_or_its_own_folder(checkpoint, parts, other_weights):
    whole = load_components(str(checkpoint), components={"unet": str(other_weights), "vae": None})
    alone = load_components(str(checkpoint), components={"unet": str(other_weights / "unet")})
    assert equal(whole.unet, alone.unet) and not equal(whole.unet, parts.unet)
    assert equal(whole.vae, parts.vae) and whole.source == str(checkpoint)


def test_a_replaced_part_may_be_missing_from_the_checkpoint(copy, checkpoint, parts):
    shutil.rmtree(copy / "unet")
    assert equal(load_components(str(copy), components={"unet": str(checkpoint)}).unet, parts.unet)


def test_a_tilde_stands_for_the_home_folder(checkpoint, parts, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint))
    assert equal(load_part("vae", "~/vae"), parts.vae)
    assert equal(load_components("~").vae, parts.vae)


@pytest.mark.parametrize("part", MODELS)
def test_scratch_keeps_the_architecture_and_draws_new_weights(checkpoint, parts, part):
    fresh, old = getattr(load_components(str(checkpoint), scratch=[part]), part), getattr(parts, part)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in old.state_dict().items()}
    assert not equal(fresh, old)


def test_the_default_guidance_scale_comes_from_the_checkpoint_and_is_exported(copy, tmp_path):
    tiny = StableDiffusionModule.from_pretrained("tiny")
    assert tiny.infer("a star", num_inference_steps=1)["metadata"]["guidance_scale"] == 2.0
    tiny.save_pretrained(tmp_path / "own")
    assert load_components(str(tmp_path / "own")).guidance_scale == 2.0
    (copy / "sampling.json").unlink(missing_ok=True)
    assert load_components(str(copy)).guidance_scale == 7.5
    (copy / "sampling.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"sampling\.json cannot be read"):
        load_components(str(copy))


def test_a_saved_checkpoint_does_not_hold_the_path_it_was_loaded_from(copy, tmp_path):
    save_components(load_components(str(copy)), tmp_path / "own")
    for config in (tmp_path / "own").rglob("*.json"):
        assert str(copy) not in config.read_text()


def test_a_text_encoder_from_scratch_starts_with_distant_embeddings(checkpoint):
    torch.manual_seed(0)
    fresh = load_components(str(checkpoint), scratch=["text_encoder"])
    tokens = torch.tensor(fresh.tokenizer(["circle", "square"], add_special_tokens=False).input_ids)
    circle, square = fresh.text_encoder.get_input_embeddings().weight[tokens[:, 0]]
    clip_distance = 0.02 * len(circle) ** 0.5  # CLIP initialises each dimension with a deviation of 0.02
    assert (circle - square).norm() > 10 * clip_distance


def test_sampling_uses_the_scheduler_of_the_checkpoint(copy):
    PNDMScheduler(steps_offset=1, skip_prk_steps=True).save_pretrained(copy / "scheduler")
    out = StableDiffusionModule.from_pretrained(str(copy)).infer("a red circle", num_inference_steps=2)
    assert out["metadata"]["scheduler"] == "PNDMScheduler"


# ------------------------------------------------------------------------------------------ saving


def test_a_saved_checkpoint_loads_with_equal_weights(parts, tmp_path):
    save_components(parts, tmp_path)
    again = load_components(str(tmp_path))
    assert all(equal(getattr(again, part), getattr(parts, part)) for part in MODELS)
    assert again.scheduler.config == parts.scheduler.config
    assert again.tokenizer("a red circle").input_ids == parts.tokenizer("a red circle").input_ids


def test_text_encoder_keys_have_the_prefix_that_other_tools_expect(checkpoint):
    assert all(name.startswith("text_model.") for name in load_file(checkpoint / "text_encoder" / "model.safetensors"))


def test_diffusers_loads_an_export_of_the_embedded_model_without_a_word_and_nothing_changes(tmp_path, caplog):
    module = StableDiffusionModule.from_pretrained("tiny")
    module.save_pretrained(tmp_path)
    again = StableDiffusionModule.from_pretrained(str(tmp_path))
    changed = {"steps_offset", "_use_default_values", "_diffusers_version"}
    before, after = module.parts.scheduler.config, again.parts.scheduler.config
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    for scheduler in (None, "euler", "dpmpp_2m", "pndm"):
        one, other = (
            sd.infer(
                "a red circle on a blue background", num_inference_steps=3, scheduler=scheduler, return_type="tensor"
            )
            for sd in (module, again)
        )
        assert torch.equal(one["samples"], other["samples"]), scheduler

    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not [w for w in warned if "outdated" in str(w.message)] and "outdated" not in caplog.text
    pipeline.set_progress_bar_config(disable=True)
    prompt, settings = "a red circle on a blue background", {"num_inference_steps": 3, "guidance_scale": 2.0}
    image = pipeline(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **settings).images
    assert np.array_equal(image, again.infer(prompt, return_type="numpy", guidance_rescale=0.0, **settings)["samples"])


def test_a_scheduler_whose_timesteps_would_change_is_saved_as_it_is(checkpoint, tmp_path):
    scheduler = DDIMScheduler(steps_offset=0, timestep_spacing="leading")
    save_part("scheduler", scheduler, tmp_path)
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["steps_offset"] == 0


def test_diffusers_loads_the_folder_and_makes_equal_images(module, tmp_path):
    module.save_pretrained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    theirs = pipeline("a red circle", num_inference_steps=3, generator=generator, output_type="np").images
    ours = module.infer("a red circle", num_inference_steps=3, return_type="numpy")["samples"]
    assert np.array_equal(ours, theirs)


def test_a_float16_export_is_half_the_size_and_samples_alike(module, checkpoint, tmp_path):
    module.save_pretrained(tmp_path, dtype="float16")
    full, half = (folder / "unet" / WEIGHTS for folder in (checkpoint, tmp_path))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    again = StableDiffusionModule.from_pretrained(str(tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float32}, "loaded as float32"
    settings = {"num_inference_steps": 2, "return_type": "numpy"}
    images = [sd.infer("a red circle", **settings)["samples"] for sd in (module, again)]
    np.testing.assert_allclose(*images, atol=0.02)


def test_the_index_names_the_class_of_each_part(checkpoint):
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
