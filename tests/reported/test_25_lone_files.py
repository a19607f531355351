"""Row 25: lone parts in the original layout, checkpoints without a VAE, convolutions in the place of linear layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sdmodule.components import shipped_configs, single_file
from sdmodule.components.checkpoint import load_components
from sdmodule.components.single_file import load_single_file, load_single_part
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import STABLE_DIFFUSION
from sdmodule.families.stable_diffusion import StableDiffusion
from tests.original_layout import original_layout, tiny_parts

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    parts = tiny_parts(folder)
    return SimpleNamespace(parts=parts, folder=folder, weights=original_layout(parts))


@pytest.fixture
def shipped(tiny, monkeypatch):
    """The tiny architecture in the place of the configuration of 1.x."""
    monkeypatch.setattr(StableDiffusion, "original_configs", {(4, 12): "."})
    for module in (single_file, shipped_configs):
        monkeypatch.setattr(module, "CONFIGS", tiny.folder)
    monkeypatch.setattr(single_file, "load_tokenizer", lambda folder, name, encoder: None)


def own(tiny, name):
    """The weights of one part, with its prefix."""
    return {key: value for key, value in tiny.weights.items() if key.startswith(PREFIXES[name])}


def bare(tiny, name):
    """The same without the prefix, as files of a part alone are shared."""
    length = len("cond_stage_model.transformer." if name == "text_encoder" else PREFIXES[name])
    return {key[length:]: value for key, value in own(tiny, name).items()}


def equal(network, other):
    weights, others = network.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".SAFETENSORS"])
@pytest.mark.parametrize("name", PREFIXES)
def test_a_file_of_one_part_is_read_with_and_without_its_prefix(tiny, shipped, tmp_path, name, suffix):
    for weights in (own(tiny, name), bare(tiny, name)):
        file = tmp_path / f"{name}{suffix}"
        save_file(weights, file) if "safe" in suffix.lower() else torch.save({"state_dict": weights}, file)
        assert equal(load_single_part(file, name, STABLE_DIFFUSION), tiny.parts[name])


def test_what_training_left_in_a_lone_vae_file_is_read_past(tiny, shipped, tmp_path):
    weights = bare(tiny, "vae") | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}
    save_file(weights, tmp_path / "vae.safetensors")
    assert equal(load_single_part(tmp_path / "vae.safetensors", "vae", STABLE_DIFFUSION), tiny.parts["vae"])


def test_a_checkpoint_without_a_vae_takes_one_from_beside_it(tiny, shipped, tmp_path):
    rest = {key: value for key, value in tiny.weights.items() if not key.startswith(PREFIXES["vae"])}
    save_file(rest, tmp_path / "model.safetensors")
    save_file(bare(tiny, "vae"), tmp_path / "vae.safetensors")
    places = {"vae": str(tmp_path / "vae.safetensors")}
    parts = load_components(str(tmp_path / "model.safetensors"), components=places)
    assert equal(parts.vae, tiny.parts["vae"]) and equal(parts.unet, tiny.parts["unet"])
    with pytest.raises(SettingsError, match=r"is a checkpoint of .* without vae; .* or set components\.vae\."):
        load_components(str(tmp_path / "model.safetensors"))


def test_a_unet_alone_takes_the_place_of_another_checkpoints(checkpoint, tiny, shipped, tmp_path):
    save_file(own(tiny, "unet"), tmp_path / "unet.safetensors")
    with pytest.raises(SettingsError, match="hidden states are 32 wide and the UNet attends to 12"):
        load_components(str(checkpoint), components={"unet": str(tmp_path / "unet.safetensors")})


@pytest.mark.parametrize("linear", [True, False])
def test_projections_may_be_convolutions_or_linear_layers(tmp_path, linear):
    parts = tiny_parts(tmp_path, open_clip=linear)
    weights = original_layout(parts)
    projections = [key for key in weights if key.endswith(("proj_in.weight", "proj_out.weight")) and "attn" not in key]
    assert projections
    for key in projections:
        if "diffusion_model" in key:
            weights[key] = weights[key][..., None, None] if linear else weights[key][:, :, 0, 0]
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "model.safetensors")
    loaded = load_single_file(tmp_path / "model.safetensors", config=tmp_path, prediction_type="epsilon")
    assert equal(loaded["unet"], parts["unet"])


@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights, key: weights.pop(key), "1 missing weight: "),
        (lambda weights, key: weights.update({f"{key}.extra": torch.ones(2)}), "1 unexpected weight: "),
        (lambda weights, key: weights.update({key: torch.ones(7)}), "1 misshapen weight: "),
    ],
)
def test_a_single_file_is_checked_as_folders_are(tiny, tmp_path, name, change, said):
    """Row 1 for single files, which diffusers reads without a look at what is left over."""
    weights = dict(tiny.weights)
    ends = {"unet": "out.2.bias", "vae": "decoder.conv_out.bias", "text_encoder": "final_layer_norm.bias"}
    change(weights, next(key for key in weights if key.endswith(ends[name]) and key.startswith(PREFIXES[name])))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match=f"does not fit .*{name} \\({said}"):
        load_single_file(tmp_path / "model.safetensors", config=tiny.folder)


def test_a_whole_text_encoder_of_2x_is_checked_too(tmp_path):
    parts = tiny_parts(tmp_path, open_clip=True)
    weights = original_layout(parts)
    save_file(weights | {"cond_stage_model.model.text_projection": torch.ones(12, 12)}, tmp_path / "good.safetensors")
    load_single_file(tmp_path / "good.safetensors", config=tmp_path, prediction_type="epsilon")
    save_file(weights | {"cond_stage_model.model.adapter": torch.ones(2, 2)}, tmp_path / "bad.safetensors")
    with pytest.raises(SettingsError, match=r"1 unexpected weight: cond_stage_model\.model\.adapter"):
        load_single_file(tmp_path / "bad.safetensors", config=tmp_path, prediction_type="epsilon")


def test_a_file_that_exists_is_not_called_missing(tmp_path):
    torch.save([1], tmp_path / "model.pt")
    with pytest.raises(SettingsError, match=r"model\.pt: holds a list"):
        load_components(str(tmp_path / "model.pt"))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(SettingsError, match=r"model\.onnx: is a file of another kind"):
        load_components(str(tmp_path / "model.onnx"))
