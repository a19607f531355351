"""Stable Diffusion XL is sampled from Python as diffusers does it; what is not supported yet is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sdmodule.components.checkpoint import family_of, load_components
from sdmodule.components.save import save_components
from sdmodule.conditioning.text import encode_texts
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import STABLE_DIFFUSION
from sdmodule.families.stable_diffusion_xl import StableDiffusionXL
from sdmodule.module import StableDiffusionModule
from sdmodule.sampling.decode import decode
from sdmodule.sampling.schedule import warn_of_size
from sdmodule.sampling.settings import SamplingSettings
from tests.xl_parts import xl_pipeline

PROMPT, OTHER = "a red circle on a blue background", "a small green star"


@pytest.fixture(scope="module")
def xl(xl_checkpoint) -> StableDiffusionModule:
    return StableDiffusionModule.from_pretrained(xl_checkpoint)


def images(module, *prompt, **options):
    common = {"num_inference_steps": 3, "return_type": "numpy", "show_progress": False}
    return module.infer(*prompt, **common | options)["samples"]


def test_the_family_is_that_of_the_index(xl, xl_checkpoint):
    assert type(family_of(str(xl_checkpoint))) is StableDiffusionXL is type(xl.parts.family)
    assert xl.describe()["guidance_scale"] == 5.0 and xl.resolution == 32


def test_what_is_saved_is_read_back_with_equal_weights(xl, tmp_path):
    save_components(xl.parts, tmp_path)
    again = load_components(str(tmp_path))
    for name, network in xl.parts.networks.items():
        saved = again.networks[name].state_dict()
        assert saved.keys() == network.state_dict().keys()
        assert all(torch.equal(weight, saved[key]) for key, weight in network.state_dict().items())
    assert again.zero_empty_prompts and again.tokenizer_2.pad_token == "!"


# ------------------------------------------------------------------------------------------------------------ text


def test_embeddings_are_those_of_diffusers(xl, xl_checkpoint):
    hidden, _, pooled, _ = xl_pipeline(xl_checkpoint).encode_prompt([PROMPT, OTHER], do_classifier_free_guidance=False)
    ours = encode_texts([PROMPT, OTHER], xl.parts, chunks=1)
    assert torch.equal(ours.hidden_states, hidden) and torch.equal(ours.pooled, pooled)


def test_a_long_prompt_is_encoded_in_chunks_by_both_encoders_and_pooled_from_the_first(xl, xl_checkpoint):
    words = "a red circle and a blue star and " * 12
    pipeline = xl_pipeline(xl_checkpoint)
    tokens = pipeline.tokenizer(words, add_special_tokens=False).input_ids
    chunks = [tokens[start : start + 75] for start in range(0, len(tokens), 75)]
    assert len(chunks) > 1
    hidden, pooled = [], []
    for chunk in chunks:
        parts = []
        for tokenizer, encoder in ((pipeline.tokenizer, "text_encoder"), (pipeline.tokenizer_2, "text_encoder_2")):
            padding = [tokenizer.pad_token_id] * (75 - len(chunk))
            row = torch.tensor([[tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding]])
            output = getattr(pipeline, encoder)(row, output_hidden_states=True)
            parts.append(output.hidden_states[-2])
        hidden.append(torch.cat(parts, dim=-1))
        pooled.append(output[0])
    empty = torch.zeros_like(torch.cat(hidden, dim=1))
    theirs = pipeline(
        prompt_embeds=torch.cat(hidden, dim=1),
        negative_prompt_embeds=empty,
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=torch.zeros_like(pooled[0]),
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images
    ours = images(xl, words, seed=1, scheduler="euler")
    assert np.abs(ours - theirs).max() < 1e-5  # chunks share a batch here


def test_a_weight_counts_in_both_encoders(xl):
    plain = encode_texts(["a red circle"], xl.parts, chunks=1)
    weighted = encode_texts(["a (red:1.5) circle"], xl.parts, chunks=1)
    changed = (weighted.hidden_states != plain.hidden_states)[0, 2]  # after the start token and "a"
    assert changed[:32].any() and changed[32:].any()
    assert torch.equal(weighted.pooled, plain.pooled)


def test_an_empty_negative_prompt_is_zeros_only_where_the_checkpoint_says_so(xl, xl_checkpoint, tmp_path):
    folder = shutil.copytree(xl_checkpoint, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    ours = images(StableDiffusionModule.from_pretrained(folder), PROMPT, seed=1)
    generator = torch.Generator().manual_seed(1)
    theirs = xl_pipeline(folder)(PROMPT, num_inference_steps=3, generator=generator, output_type="np").images
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, images(xl, PROMPT, seed=1))


# ------------------------------------------------------------------------------------------------- images and speed


def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(xl):
    both = images(xl, [PROMPT, OTHER], negative_prompt=["", "blue"], seed=4)
    alone = images(xl, OTHER, negative_prompt="blue", seed=5)
    assert np.abs(both[1:] - alone).max() < 1e-4


def test_given_latents_and_several_images_per_prompt(xl, xl_checkpoint):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    common = {"num_inference_steps": 3, "num_images_per_prompt": 2, "guidance_scale": 3.0, "guidance_rescale": 0.5}
    theirs = xl_pipeline(xl_checkpoint, "ddim")(PROMPT, latents=latents, output_type="np", **common).images
    assert np.array_equal(images(xl, PROMPT, latents=latents, scheduler="ddim", **common), theirs)


@pytest.mark.parametrize(
    ("changes", "equal"),
    [
        ({"tome": {"ratio": 0.5}}, False),
        ({"tome": {"ratio": 0.5, "max_downsample": 2, "engine": "window"}}, False),
        ({"speed": {"cache_every": 2}, "num_inference_steps": 1}, True),
        ({"speed": {"cache_every": 2, "guidance_interval": (0.0, 0.5)}}, False),
    ],
)
def test_token_merging_and_speed(xl, changes, equal):
    before = {name: weight.clone() for name, weight in xl.state_dict().items()}
    steps = {"num_inference_steps": changes.get("num_inference_steps", 3)}
    plain, made = images(xl, PROMPT, **steps), images(xl, PROMPT, **changes)
    assert np.array_equal(plain, made) == equal and np.isfinite(made).all()
    assert all(torch.equal(weight, before[name]) for name, weight in xl.state_dict().items())
    assert np.array_equal(plain, images(xl, PROMPT, **steps))


def test_the_vae_decodes_in_float32_where_it_would_overflow(xl_checkpoint):
    parts = load_components(str(xl_checkpoint))
    parts.vae.half()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = decode(parts, latents)
    assert parts.vae.dtype == torch.float16
    with torch.no_grad():
        expected = parts.vae.float().decode(latents / parts.vae.config.scaling_factor).sample
    assert torch.equal(decoded, (expected / 2 + 0.5).clamp(0, 1))


# ------------------------------------------------------------------------------------------------------ bad input


def test_parts_of_the_other_family_are_refused(checkpoint, xl_checkpoint, tmp_path):
    for pretrained, other in ((xl_checkpoint, checkpoint), (checkpoint, xl_checkpoint)):
        with pytest.raises(SettingsError, match=r"the part unet cannot be read \(it"):
            load_components(str(pretrained), components={"unet": str(other / "unet")})
    narrow = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    CLIPTextModel(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(SettingsError, match="text encoders' joined hidden states are 64 wide"):
        load_components(str(xl_checkpoint), components={"text_encoder": str(tmp_path / "narrow")})
    with pytest.raises(SettingsError, match="components=text_encoder_2: unknown"):
        load_components(str(checkpoint), components={"text_encoder_2": str(xl_checkpoint)})


def test_a_vae_and_a_unet_may_come_from_elsewhere(xl_checkpoint, tmp_path):
    vae = AutoencoderKL.from_pretrained(xl_checkpoint / "vae")
    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained(tmp_path / "vae")
    UNet2DConditionModel.from_pretrained(xl_checkpoint / "unet").save_pretrained(tmp_path / "unet")
    parts = load_components(
        str(xl_checkpoint), components={"vae": str(tmp_path / "vae"), "unet": str(tmp_path / "unet")}
    )
    assert torch.equal(parts.vae.decoder.conv_out.bias, vae.decoder.conv_out.bias)


def test_a_vae_that_shifts_latents_is_refused(xl_checkpoint, tmp_path):
    vae = AutoencoderKL.from_pretrained(xl_checkpoint / "vae")
    vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[5.0] * 4)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(SettingsError, match=r"its VAE shifts latents channel by channel \(latents_mean\)"):
        load_components(str(xl_checkpoint), components={"vae": str(tmp_path / "vae")})


def test_a_size_that_it_was_not_trained_on_is_warned_of():
    parts = SimpleNamespace(
        family=StableDiffusionXL(),
        resolution=1024,
        pixels_per_latent=8,
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=128)),
        vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4)),
    )
    assert len(parts.family.trained_sizes) == 40 and (1024, 1024) in parts.family.trained_sizes
    with pytest.warns(UserWarning, match="height=512, width=512: .* the nearest in shape is height=1024 width=1024"):
        warn_of_size(parts, SamplingSettings(height=512, width=512))
    with pytest.warns(UserWarning, match="nearest in shape is height=768 width=1344"):
        warn_of_size(parts, SamplingSettings(height=720, width=1280))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_size(parts, SamplingSettings(height=832, width=1216))
        warn_of_size(SimpleNamespace(**vars(parts) | {"family": STABLE_DIFFUSION}), SamplingSettings(height=512))
