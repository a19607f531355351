"""The real architecture of Stable Diffusion XL on the meta device, without memory: names of layers, blocks, sizes."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils as ldm
from torch import nn

from benchmarks.xl_step import CONFIG
from sdmodule.components.original_layout import build_network, to_original
from sdmodule.components.original_names import unet_layer
from sdmodule.components.shipped_configs import CONFIGS
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import FAMILIES
from sdmodule.speed.deep_cache import check_cache
from sdmodule.tome.blocks import blocks_to_merge, transformer_blocks

# the places of the attentions, and of the layers that resize, in files of kohya's scripts
ATTENTIONS = {f"input_blocks.{k}.1" for k in (4, 5, 7, 8)} | {f"output_blocks.{k}.1" for k in range(6)}
RESIZING = {"input_blocks.3.0.op", "input_blocks.6.0.op", "output_blocks.2.2.conv", "output_blocks.5.2.conv"}


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIG)


def test_original_names_of_layers(unet):
    layers = [name for name, layer in unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    names = {layer: unet_layer(layer, unet) for layer in layers}
    assert len(set(names.values())) == len(layers)
    attended = {re.match(r"[a-z]+_blocks?\.\d+(\.\d+)?", name)[0] for name in names.values() if ".attn1." in name}
    assert attended == ATTENTIONS | {"middle_block.1"}
    assert {name for layer, name in names.items() if "samplers" in layer} == RESIZING
    assert names["add_embedding.linear_1"] == "label_emb.0.0" and names["conv_out"] == "out.2"


def test_token_merging_and_feature_caching_find_their_blocks(unet):
    assert len(transformer_blocks(unet)) == 70
    assert len(blocks_to_merge(unet, 2)) == 2 * 2 + 3 * 2
    with pytest.raises(SettingsError, match=r"set tome\.max_downsample=2"):
        blocks_to_merge(unet, 1)
    check_cache(unet, 3)


ORIGINAL_KEYS = {
    # https://github.com/Stability-AI/generative-models: the names that other tools know the file by
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
    "model.diffusion_model.label_emb.0.2.bias",
    "first_stage_model.decoder.up.0.block.2.norm1.weight",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight",
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
    "conditioner.embedders.1.model.text_projection",
}


@pytest.mark.parametrize("name", [name for family in FAMILIES for name in family.original_configs.values()])
def test_published_architectures_have_names_in_the_original_layout_that_diffusers_reads(name):
    family = next(family for family in FAMILIES if name in family.original_configs.values())
    keys = set()
    for part, kind in family.models.items():
        config = CONFIGS / name / part
        with torch.device("meta"):
            made = kind(kind.config_class.from_pretrained(config)) if "text" in part else None
            network = made or kind.from_config(kind.load_config(config))
        weights = to_original(part, network)
        prefix = family.original_prefixes[part]
        keys |= {f"{prefix}{key}" for key in weights}
        assert {key: value.shape for key, value in read_by_diffusers(part, prefix, weights, network).items()} == {
            key.removeprefix("text_model."): value.shape for key, value in network.state_dict().items()
        }
        found = build_network(kind, {key: torch.empty_like(value) for key, value in weights.items()}, config, None)
        assert found.state_dict().keys() == network.state_dict().keys()
    assert name != "sdxl" or keys >= ORIGINAL_KEYS


def read_by_diffusers(part, prefix, weights, network):
    """The weights by the converters of diffusers."""
    whole = {f"{prefix}{key}": value for key, value in weights.items()}
    if part == "unet":
        return ldm.convert_ldm_unet_checkpoint(whole, config=network.config)
    if part == "vae":
        return ldm.convert_ldm_vae_checkpoint(whole, config=network.config)
    if any(key.startswith("model.") for key in weights):
        read = ldm.convert_open_clip_checkpoint(network, whole, prefix=f"{prefix}model.")
    else:
        read = ldm.convert_ldm_clip_checkpoint(whole)
    return {key.removeprefix("text_model."): value for key, value in read.items()}
