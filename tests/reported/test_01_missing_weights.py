"""Row 1: every loader refuses missing, unexpected and misshapen weights in one sentence, with part, count and names."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdmodule.components.checkpoint import load_components
from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.save import save_model
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
NAMES = {"unet": "conv_out.weight", "vae": "decoder.conv_out.weight", "text_encoder": "final_layer_norm.weight"}


def drop(weights, name):
    """Take away one weight, or all of a layer."""
    for key in [key for key in weights if name in key]:
        del weights[key]


def add(weights, name):
    weights[f"extra.{name}"] = torch.zeros(3)


def misshape(weights, name):
    [key] = [key for key in weights if key.endswith(name)]
    weights[key] = torch.zeros(7)


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint in which one part's weights are changed."""

    def damage(part, change, name):
        folder = shutil.copytree(checkpoint, tmp_path / "damaged")
        file = folder / part / FILES[part]
        weights = load_file(file)
        change(weights, name)
        save_file(weights, file, metadata={"format": "pt"})
        return folder

    return damage


def refused(load, *arguments, **settings) -> str:
    with pytest.raises(SettingsError) as error:
        load(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize(("change", "word"), [(drop, "missing"), (add, "unexpected"), (misshape, "misshapen")])
def test_a_folder_with_other_weights_than_its_architecture_is_refused(damaged, part, change, word):
    folder = damaged(part, change, NAMES[part])
    message = refused(load_components, str(folder))
    assert f"pretrained={folder}: the part {part} cannot be read (1 {word} weight: " in message
    assert NAMES[part] in message and f"components.{part}" in message


def test_a_text_encoder_without_a_layer_is_refused_with_the_number_and_the_first_names(damaged):
    message = refused(load_components, str(damaged("text_encoder", drop, "layers.1.")))
    assert "16 missing weights: " in message and "encoder.layers.1.layer_norm1.bias" in message
    assert "and 13 more" in message


@pytest.mark.parametrize("part", FILES)
def test_a_replaced_part_is_checked_likewise(checkpoint, damaged, part):
    place = str(damaged(part, drop, NAMES[part]) / part)
    message = refused(load_components, str(checkpoint), components={part: place})
    assert f"components.{part}={place}" in message and "1 missing weight: " in message


def test_a_part_of_another_class_is_refused_when_it_is_loaded(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "AsymmetricAutoencoderKL"}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(load_components, str(checkpoint), components={"vae": str(folder)})
    assert "it is AsymmetricAutoencoderKL, not AutoencoderKL" in message


def test_a_text_encoder_of_another_kind_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint / "text_encoder", tmp_path / "text_encoder")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "t5"}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(load_components, str(checkpoint), components={"text_encoder": str(folder)})
    assert "it is t5, not CLIPTextModel" in message


@pytest.mark.parametrize(("change", "word"), [(drop, "missing"), (add, "unexpected"), (misshape, "misshapen")])
def test_a_controlnet_is_checked_likewise(module, tmp_path, change, word):
    folder = tmp_path / "net"
    save_model(controlnet_from_unet(module.parts), folder)
    weights = load_file(folder / FILES["unet"])
    change(weights, "controlnet_mid_block.weight")
    save_file(weights, folder / FILES["unet"], metadata={"format": "pt"})
    message = refused(StableDiffusionModule, module.parts.source, components={"controlnet": str(folder)})
    assert f"controlnet={folder}: cannot be read (1 {word} weight: " in message


def test_a_unet_is_no_controlnet(checkpoint):
    place = str(checkpoint / "unet")
    message = refused(StableDiffusionModule, str(checkpoint), components={"controlnet": place})
    assert "it is UNet2DConditionModel, not ControlNetModel" in message


def test_keys_that_are_known_to_be_harmless_are_read_past(damaged):
    def add_positions(weights, _):
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        weights["logit_scale"] = torch.ones(())
        weights["vision_model.post_layernorm.weight"] = torch.ones(3)

    folder = damaged("text_encoder", add_positions, "")
    assert load_components(str(folder)).text_encoder.config.num_hidden_layers == 2


def test_the_libraries_report_nothing_beside_the_sentence(damaged, capfd):
    refused(load_components, str(damaged("unet", drop, NAMES["unet"])))
    assert "newly initialized" not in "".join(capfd.readouterr())
