"""Weights in the original layout of Stable Diffusion, as those of diffusers' networks, with every key accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as ldm
from transformers import CLIPTextModel

from sdmodule.components.load_network import UnfitWeights, check_weights
from sdmodule.components.weights_file import Weights

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

READERS: dict[str, Callable[..., torch.nn.Module]] = {
    "unet": UNet2DConditionModel.from_single_file,
    "vae": AutoencoderKL.from_single_file,
    "text_encoder": partial(ldm.create_diffusers_clip_model_from_ldm, CLIPTextModel),
}

BARE = {
    "unet": "input_blocks.0.0.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "text_model.final_layer_norm.weight",
}
"""A key of each part in a file that holds this part alone, without its prefix."""

_NOT_A_NETWORK = re.compile(r"^(loss|model_ema)\.")
"""Keys of lone autoencoder files that belong to its training."""

_OPEN_CLIP_KEY = re.compile(
    r"token_embedding\.weight|positional_embedding|ln_final\.(weight|bias)|text_projection|logit_scale|attn_mask|"
    r"transformer\.resblocks\.\d+\.(ln_1|ln_2|attn|mlp)\..+"
)


def with_prefix(name: str, weights: Weights) -> Weights:
    """The weights of a part as a whole checkpoint names them, from a file of either."""
    if name in BARE and BARE[name] in weights:
        prefix = CLIP if name == "text_encoder" else PREFIXES[name]
        return {f"{prefix}{key}": value for key, value in weights.items() if not _NOT_A_NETWORK.match(key)}
    # transformers 5 writes text encoders without the prefix that the original layout has
    return {
        key.replace(CLIP, f"{CLIP}text_model.") if key.startswith(CLIP) and "text_model." not in key else key: value
        for key, value in weights.items()
    }


def build_network(name: str, weights: Weights, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Build one network from the weights of a whole checkpoint.

    Args:
        name: ``unet``, ``vae`` or ``text_encoder``.
        weights: of the original layout, with the part's prefix.
        folder: local diffusers folder of the architecture.
        dtype: of the network's weights.

    Raises:
        UnfitWeights: if the weights are not exactly those of the architecture.
        Exception: of many kinds, from the readers of diffusers.
    """
    own = {key: value for key, value in weights.items() if key.startswith(PREFIXES[name])}
    if name == "unet":
        own = _shape_projections(own, folder)
    _check_complete(name, own, folder)
    source = {"config": str(folder), "subfolder": name, "torch_dtype": dtype, "local_files_only": True}
    return READERS[name](own, **source)


def _shape_projections(weights: Weights, folder: Path) -> Weights:
    """Projections of the transformer blocks as the architecture has them: a 1x1 convolution is a linear layer."""
    linear = json.loads((folder / "unet" / "config.json").read_text()).get("use_linear_projection", False)

    def shaped(key: str, weight: torch.Tensor) -> torch.Tensor:
        if not re.search(r"\.proj_(in|out)\.weight$", key):
            return weight
        if linear and weight.ndim == 4 and weight.shape[2:] == (1, 1):
            return weight[:, :, 0, 0]
        return weight[:, :, None, None] if not linear and weight.ndim == 2 else weight

    return {key: shaped(key, weight) for key, weight in weights.items()}


def _check_complete(name: str, weights: Weights, folder: Path) -> None:
    """Check that weights are exactly those of an architecture, before diffusers' readers see them.

    Raises:
        UnfitWeights: if they are not.
    """
    with init_empty_weights():
        network = _empty_network(name, folder)
    expected = network.state_dict()
    try:
        converted = _convert(name, weights, network, folder)
    except KeyError as error:  # a converter asks for a key that is missing
        raise UnfitWeights(f"the weight {error.args[0]} is missing") from error
    check_weights(
        missing=expected.keys() - converted.keys(),
        unexpected=_unused(name, weights, converted, expected),
        misshapen=[key for key, value in converted.items() if key in expected and value.shape != expected[key].shape],
    )


def _empty_network(name: str, folder: Path) -> Any:
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextModel.config_class.from_pretrained(folder / name))
    kind: Any = UNet2DConditionModel if name == "unet" else AutoencoderKL
    return kind.from_config(kind.load_config(folder, subfolder=name))


def _convert(name: str, weights: Weights, network: Any, folder: Path) -> Weights:
    """The weights under diffusers' names."""
    if name != "text_encoder":
        convert = ldm.convert_ldm_unet_checkpoint if name == "unet" else ldm.convert_ldm_vae_checkpoint
        return convert(dict(weights), config=json.loads((folder / name / "config.json").read_text()))
    if any(key.startswith(OPEN_CLIP) for key in weights):
        converted = ldm.convert_open_clip_checkpoint(network, dict(weights), prefix=OPEN_CLIP)
    else:
        converted = ldm.convert_ldm_clip_checkpoint(dict(weights))
    inside = "text_model." if hasattr(network, "text_model") else ""
    return {inside + key.removeprefix("text_model."): value for key, value in converted.items()}


def _unused(name: str, weights: Weights, converted: Weights, expected: Weights) -> list[str]:
    """Keys of a file that become no weight of the network."""
    if name == "text_encoder":
        if any(key.startswith(OPEN_CLIP) for key in weights):
            return [key for key in weights if not _OPEN_CLIP_KEY.fullmatch(key.removeprefix(OPEN_CLIP))]
        return [key for key in converted if key not in expected]
    used = {value.data_ptr() for value in converted.values()}
    return [key for key, value in weights.items() if value.data_ptr() not in used]
