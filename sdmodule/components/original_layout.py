"""Weights in the original layout of Stable Diffusion, as those of diffusers' networks and back, each accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdmodule.components.load_network import HARMLESS, UnfitWeights, check_weights, first_names
from sdmodule.components.original_names import original_key
from sdmodule.components.weights_file import Weights

BARE = {
    "unet": "input_blocks.0.0.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "text_model.final_layer_norm.weight",
    "text_encoder_2": "text_model.final_layer_norm.weight",
}
"""A key of each part in a file that holds this part alone, without its prefix."""

CLIP, OPEN_CLIP = "transformer.", "model."
"""What the keys of a text encoder begin with, after the prefix of its part: in the layouts of CLIP and of OpenCLIP."""

_NOT_A_NETWORK = re.compile(r"^(loss|model_ema)\.")
"""Keys of lone autoencoder files that belong to its training."""

_BESIDE_OPEN_CLIP = re.compile(
    r"model\.(text_projection|logit_scale|attn_mask|transformer\.resblocks\.\d+\.(ln_1|ln_2|attn|mlp)\..+)"
)
"""Keys of OpenCLIP that may stand beside those of a network: 2.x leaves out its last layer and its projection."""


def part_of(name: str, prefix: str, weights: Weights) -> Weights:
    """The weights of one part without its prefix, from a whole checkpoint or a file of this part alone; may be none."""
    if name in BARE and BARE[name] in weights:
        own = {key: value for key, value in weights.items() if not _NOT_A_NETWORK.match(key)}
        return {f"{CLIP}{key}": value for key, value in own.items()} if name.startswith("text_encoder") else own
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not name.startswith("text_encoder"):
        return own
    return {_with_text_model(key): value for key, value in own.items()}


def _with_text_model(key: str) -> str:
    """The key with the part that transformers 5 leaves out."""
    return re.sub(r"^transformer\.(?=(embeddings|encoder|final_layer_norm)\.)", "transformer.text_model.", key)


def is_open_clip(weights: Iterable[str]) -> bool:
    """Whether the keys of a text encoder are in the layout of OpenCLIP."""
    return any(key.startswith(OPEN_CLIP) for key in weights)


def build_network(kind: Any, weights: Weights, config: Path, dtype: torch.dtype, prefix: str = "") -> Any:
    """Build a network from its weights in the original layout, in evaluation mode.

    Args:
        kind: class of the network.
        weights: of the network alone, without the prefix of its part.
        config: local folder of its configuration.
        dtype: of the network's weights.
        prefix: of its part, for messages.

    Raises:
        UnfitWeights: if the weights are not exactly those of the architecture.
    """
    with init_empty_weights():
        if issubclass(kind, (CLIPTextModel, CLIPTextModelWithProjection)):
            network = kind(kind.config_class.from_pretrained(config))
        else:
            network = kind.from_config(kind.load_config(config))
    network.load_state_dict(_converted(weights, network, prefix), assign=True)
    return network.to(dtype).eval()


def _converted(weights: Weights, network: nn.Module, prefix: str) -> Weights:
    """The weights by the names of the network.

    Raises:
        UnfitWeights: if they are not exactly its weights.
    """
    open_clip = is_open_clip(weights)
    expected = network.state_dict()
    names = {key: original_key(key, network, open_clip) for key in expected}
    used = set(names.values())
    unexpected = [key for key in weights if key not in used and not (open_clip and _BESIDE_OPEN_CLIP.fullmatch(key))]
    found = {
        key: _shaped_as(expected[key], _piece(key, weights[name], open_clip))
        for key, name in names.items()
        if name in weights
    }
    check_weights(
        missing=expected.keys() - found.keys(),
        unexpected=[f"{prefix}{key}" for key in unexpected if not HARMLESS.search(key.removeprefix(CLIP))],
        misshapen=[key for key, value in found.items() if value.shape != expected[key].shape],
    )
    return found


def _piece(key: str, value: Tensor, open_clip: bool) -> Tensor:
    """A network's weight, of what OpenCLIP keeps together or transposes."""
    if not open_clip:
        return value
    if found := re.search(r"\.([qkv])_proj\.", key):
        size = len(value) // 3
        first = size * "qkv".index(found[1])
        return value[first : first + size].clone()
    return value.T.contiguous() if key.startswith("text_projection") and value.ndim == 2 else value


def _shaped_as(wanted: Tensor, value: Tensor) -> Tensor:
    """A linear layer from a convolution of 1 x 1, and the reverse: projections are either in the original layout."""
    more, less = (value, wanted) if value.ndim > wanted.ndim else (wanted, value)
    same = more.shape[: less.ndim] == less.shape and set(more.shape[less.ndim :]) <= {1}
    return value.reshape(wanted.shape) if same and more.ndim != less.ndim else value


def to_original(name: str, network: nn.Module) -> Weights:
    """The weights of a network in the original layout, without the prefix of its part.

    Args:
        name: of its part.
        network: a UNet, an autoencoder or a text encoder; one with the activation of OpenCLIP gets its layout.

    Raises:
        UnfitWeights: for weights that the original layout has no name for.
    """
    open_clip = name.startswith("text_encoder") and has_open_clips_activation(network.config)
    state = network.state_dict()
    names = {key: original_key(key, network, open_clip) for key in state}
    if unnamed := [key for key, name in names.items() if name is None]:
        raise UnfitWeights(f"the original layout has no names for {first_names(unnamed)}")
    pieces: dict[str, list[Tensor]] = {}
    for key in sorted(state, key=_queries_keys_values):
        pieces.setdefault(str(names[key]), []).append(_as_original(name, key, state[key], open_clip))
    return {key: torch.cat(values) if len(values) > 1 else values[0] for key, values in pieces.items()}


def _queries_keys_values(key: str) -> tuple[str, int]:
    """Sorts queries, keys and values of a layer in this order."""
    found = re.search(r"\.([qkv])_proj\.", key)
    return (key.replace(found[0], ".q_proj."), "qkv".index(found[1])) if found else (key, 0)


def _as_original(name: str, key: str, value: Tensor, open_clip: bool) -> Tensor:
    if name == "vae" and re.search(r"attentions\.0\.to_.*weight$", key):
        return value[..., None, None]  # convolutions of 1 x 1
    return value.T if open_clip and key.startswith("text_projection") else value


def has_open_clips_activation(config: Any) -> bool:
    """Whether a text encoder is one of OpenCLIP's: they have the exact GELU, and OpenAI's have a faster one."""
    return config.hidden_act == "gelu"
