"""Names of weights in the original implementations of Stable Diffusion, for networks of diffusers and transformers.

UNet and autoencoder have those of CompVis' latent-diffusion (Rombach et al. 2022) and of Stability AI's
generative-models (Podell et al. 2023); a text encoder has those of OpenAI's CLIP, or of OpenCLIP.
"""

from __future__ import annotations

import re
from typing import Any

from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_VAE_NAMES = (
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
_OPEN_CLIP_NAMES = (
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    ("self_attn", "attn"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
    (r"^final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
)


def original_key(key: str, network: nn.Module, open_clip: bool = False) -> str | None:
    """The name of a network's weight in the original layout, without the prefix of its part; None if it has none.

    Args:
        key: of the network's ``state_dict``.
        network: a UNet, an autoencoder or a text encoder.
        open_clip: name a text encoder's weights as OpenCLIP does, which keeps queries, keys and values in one matrix;
            otherwise as OpenAI's CLIP.
    """
    if isinstance(network, (CLIPTextModel, CLIPTextModelWithProjection)):
        short = key.removeprefix("text_model.")  # transformers 5 leaves it out of some text encoders
        if open_clip:
            return f"model.{_substituted(short, _OPEN_CLIP_NAMES)}"
        return f"transformer.{short}" if short.startswith("text_projection") else f"transformer.text_model.{short}"
    if isinstance(network, AutoencoderKL):
        last = len(network.config.block_out_channels) - 1
        counted = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{last - int(found[1])}", key)
        return _substituted(counted, _VAE_NAMES)
    layer, _, end = key.rpartition(".")
    name = unet_layer(layer, network)
    return f"{name}.{end}" if name else None


def _substituted(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_layer(layer: str, unet: Any) -> str | None:
    """The name of a UNet's layer in the original implementation; None for what it does not have."""
    if layer in _UNET_ENDS:
        return _UNET_ENDS[layer]
    if found := re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", layer):
        sort, index, inner = found.groups()
        return _joined(f"middle_block.{1 if sort == 'attentions' else 2 * int(index)}", sort, inner)
    size = unet.config.layers_per_block
    if not isinstance(size, int):  # another number in each block
        return None
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", layer):
        side, block, sort, index, inner = found.groups()
        place = int(block) * (size + 1) + int(index)
        start = f"input_blocks.{1 + place}" if side == "down" else f"output_blocks.{place}"
        return _joined(f"{start}.{1 if sort == 'attentions' else 0}", sort, inner)
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", layer):
        return f"input_blocks.{(int(found[1]) + 1) * (size + 1)}.0.op"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", layer):
        attends = hasattr(unet.up_blocks[int(found[1])], "attentions")
        return f"output_blocks.{(int(found[1]) + 1) * (size + 1) - 1}.{2 if attends else 1}.conv"
    return None


def _joined(place: str, sort: str, inner: str) -> str:
    return f"{place}.{_RESNET.get(inner, inner) if sort == 'resnets' else inner}"
