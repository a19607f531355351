"""Single files of Stable Diffusion XL load without a network, with the weights and the images of diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from sdmodule.components import shipped_configs, single_file
from sdmodule.components.checkpoint import load_components, load_part
from sdmodule.components.single_file import load_single_file, open_single_file
from sdmodule.errors import SettingsError
from sdmodule.families.stable_diffusion_xl import StableDiffusionXL
from sdmodule.module import StableDiffusionModule
from tests.original_layout import original_layout, tiny_parts

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def parts(xl_checkpoint):
    return load_components(str(xl_checkpoint))


@pytest.fixture(scope="module")
def weights(parts):
    return {key: value.contiguous() for key, value in original_layout(parts.networks).items()}


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    """The checkpoint as one file."""
    file = tmp_path_factory.mktemp("xl") / "model.safetensors"
    save_file(weights, file)
    return file


@pytest.fixture
def shipped(xl_checkpoint, monkeypatch):
    """The tiny architecture in the place of the configuration of the base model."""
    monkeypatch.setattr(StableDiffusionXL, "original_configs", {(4, 80): "."})
    for module in (single_file, shipped_configs):
        monkeypatch.setattr(module, "CONFIGS", xl_checkpoint)


def assert_equal(network, other):
    weights, others = network.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_the_weights_are_those_of_diffusers(parts, file, xl_checkpoint):
    ours = load_single_file(file, config=xl_checkpoint)
    theirs = StableDiffusionXLPipeline.from_single_file(str(file), config=str(xl_checkpoint), local_files_only=True)
    for name in NETWORKS:
        assert_equal(ours[name], parts.networks[name])
        assert_equal(ours[name], getattr(theirs, name))
        assert not ours[name].training
    assert ours["tokenizer"]("a").input_ids[-1] == ours["tokenizer"].pad_token_id
    assert ours["tokenizer_2"].pad_token == "!"


def test_images_equal_those_of_the_folder(file, xl_checkpoint, shipped):
    options = {"num_inference_steps": 2, "return_type": "numpy", "show_progress": False}
    images = [
        StableDiffusionModule.from_pretrained(place).infer("a red circle", **options)["samples"]
        for place in (file, xl_checkpoint)
    ]
    assert np.array_equal(*images)


def test_a_ckpt_loads(parts, weights, xl_checkpoint, tmp_path):
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    assert_equal(load_single_file(tmp_path / "model.ckpt", config=xl_checkpoint)["unet"], parts.unet)


def test_parts_of_single_files_take_the_place_of_others(parts, weights, xl_checkpoint, shipped, tmp_path):
    for name, prefix in StableDiffusionXL.original_prefixes.items():
        own = {key: value for key, value in weights.items() if key.startswith(prefix)}
        save_file(own, tmp_path / f"{name}.safetensors")
        loaded = load_part(name, str(tmp_path / f"{name}.safetensors"), family=parts.family)
        assert_equal(loaded, parts.networks[name])
    prefix = StableDiffusionXL.original_prefixes["vae"]
    bare = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    save_file(bare, tmp_path / "bare.safetensors")
    loaded = load_components(str(xl_checkpoint), components={"vae": str(tmp_path / "bare.safetensors")})
    assert_equal(loaded.vae, parts.vae)
    assert loaded.vae.config.scaling_factor == parts.vae.config.scaling_factor


def test_a_vae_keeps_the_scale_of_its_own_family(file, parts, shipped):
    """In a whole checkpoint of another family it is not that of the family it is used with."""
    vae = load_part("vae", str(file))
    assert vae.config.scaling_factor == parts.vae.config.scaling_factor


def test_nine_channels_are_those_of_inpainting(parts, xl_checkpoint, tmp_path):
    config = json.loads((xl_checkpoint / "unet" / "config.json").read_text())
    wide = UNet2DConditionModel.from_config({**config, "in_channels": 9})
    save_file(original_layout({**parts.networks, "unet": wide}), tmp_path / "model.safetensors")
    folder = tmp_path / "model"
    for name in (*NETWORKS, "scheduler", "tokenizer", "tokenizer_2", "model_index.json"):
        folder.mkdir(exist_ok=True)
        if name != "unet":
            (folder / name).symlink_to(xl_checkpoint / name)
    wide.save_config(folder / "unet")
    assert_equal(load_components(str(tmp_path / "model.safetensors")).unet, wide)


def test_what_the_unet_predicts_is_read(weights, xl_checkpoint, tmp_path):
    file = tmp_path / "model.safetensors"
    for more, header, predicted, rescaled in (
        ({}, {}, "epsilon", False),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({"v_pred": torch.zeros(0)}, {}, "v_prediction", False),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, "v_prediction", True),
    ):
        save_file(weights | more, file, metadata=header)
        scheduler = load_single_file(file, config=xl_checkpoint)["scheduler"]
        assert scheduler.config.prediction_type == predicted
        assert scheduler.config.rescale_betas_zero_snr == rescaled


REFINER = {
    "model.diffusion_model.input_blocks.0.0.weight": (384, 4, 3, 3),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
    "conditioner.embedders.0.model.text_projection": (1280, 1280),
}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (REFINER, "is the refiner of Stable Diffusion XL, .*; give a checkpoint of the base model"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "is a checkpoint of Stable Diffusion 3; only Stable"),
        ({"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (1,)}, "is a checkpoint of Flux"),
        (
            {"y_embedder.y_embedding": (1,)},
            "is a checkpoint of PixArt or Sana; only .* and Stable Diffusion XL are supported",
        ),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, shapes, said):
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match=rf"model\.safetensors: {said}"):
        load_components(str(tmp_path / "model.safetensors"))


class Refiner(StableDiffusionXL):
    """What a second stage has to say of its files."""

    title = "the refiner"
    models: ClassVar = {name: StableDiffusionXL.models[name] for name in ("unet", "vae", "text_encoder_2")}
    text_encoders: ClassVar = {"tokenizer_2": "text_encoder_2"}
    original_prefixes: ClassVar = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder_2": "conditioner.embedders.0.",
    }
    original_configs: ClassVar = {(4, 1280): "sdxl_refiner"}
    not_a_base: ClassVar = {}


def test_the_layout_of_a_refiner_is_read(parts, weights, xl_checkpoint, shipped, monkeypatch, tmp_path):
    first = "conditioner.embedders.0."
    own = {
        key.replace("conditioner.embedders.1.", first): value
        for key, value in weights.items()
        if not key.startswith(first)
    }
    save_file(own, tmp_path / "refiner.safetensors")
    file = replace(open_single_file(tmp_path / "refiner.safetensors"), family=Refiner())
    loaded = load_single_file(file, config=xl_checkpoint)
    assert loaded.keys() == {"unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler"}
    monkeypatch.setattr(Refiner, "original_configs", {(4, 80): "."})
    for name in Refiner.models:
        assert_equal(loaded[name], parts.networks[name])
        assert_equal(load_part(name, str(file.path), family=Refiner()), parts.networks[name])
    assert load_part("tokenizer_2", str(file.path), family=Refiner()).pad_token == "!"
    monkeypatch.setattr(Refiner, "original_configs", {})
    with pytest.raises(SettingsError, match="is of Stable Diffusion XL; give a unet of the refiner"):
        load_part("unet", str(file.path), family=Refiner())


def test_text_encoders_alone_are_read_by_the_names_of_transformers(parts, shipped, tmp_path):
    """As ComfyUI keeps them."""
    for name in ("text_encoder", "text_encoder_2"):
        own = parts.networks[name].state_dict()
        named = {key if key.startswith("text_") else f"text_model.{key}": value for key, value in own.items()}
        save_file(named | {"logit_scale": torch.ones(())}, tmp_path / f"{name}.safetensors")
        loaded = load_part(name, str(tmp_path / f"{name}.safetensors"), family=parts.family)
        assert_equal(loaded, parts.networks[name])


def test_what_a_file_lacks_is_named(weights, xl_checkpoint, tmp_path):
    file = tmp_path / "model.safetensors"
    second = {key for key in weights if key.startswith("conditioner.embedders.1.")}
    save_file({key: value for key, value in weights.items() if key not in second}, file)
    with pytest.raises(SettingsError, match="is a checkpoint of Stable Diffusion XL without text_encoder_2; "):
        load_single_file(file, config=xl_checkpoint)
    save_file({key: value for key, value in weights.items() if not key.endswith("in_proj_bias")}, file)
    with pytest.raises(SettingsError, match=r"does not fit .*text_encoder_2 \(9 missing weights: "):
        load_single_file(file, config=xl_checkpoint)


def test_a_unet_of_another_family_is_refused(checkpoint, weights, file, xl_checkpoint, tmp_path):
    with pytest.raises(SettingsError, match=r"is of Stable Diffusion XL; give a unet of Stable Diffusion 1\.x"):
        load_components(str(checkpoint), components={"unet": str(file)})
    save_file(original_layout(tiny_parts(tmp_path)), tmp_path / "sd1.safetensors")
    with pytest.raises(SettingsError, match=r"is of Stable Diffusion 1\.x and 2\.x; give a unet of .*XL"):
        load_components(str(xl_checkpoint), components={"unet": str(tmp_path / "sd1.safetensors")})
    with pytest.raises(SettingsError, match=r"is a checkpoint of .* 2\.x; give one that holds the part text_enc"):
        load_components(str(xl_checkpoint), components={"text_encoder": str(tmp_path / "sd1.safetensors")})
