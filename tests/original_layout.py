"""Tiny models in the original layout of Stable Diffusion, written by rules of our own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

MODELS = ("unet", "vae", "text_encoder")
STEP = 2  # layers_per_block + 1 of the tiny UNet

UNET_NAMES = [
    (r"(resnets\.\d\.)norm1", r"\1in_layers.0"),
    (r"(resnets\.\d\.)norm2", r"\1out_layers.0"),
    (r"time_embedding\.linear_1", "time_embed.0"),
    (r"time_embedding\.linear_2", "time_embed.2"),
    (r"conv_in\.", "input_blocks.0.0."),
    (r"conv_norm_out", "out.0"),
    (r"conv_out", "out.2"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * STEP}.0.op"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{int(m[1]) * STEP + int(m[2]) + 1}.0"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{int(m[1]) * STEP + int(m[2]) + 1}.1"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{int(m[1]) * 2}"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"up_blocks\.0\.upsamplers\.0", f"output_blocks.{STEP - 1}.UPSAMPLER"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{int(m[1]) * STEP + int(m[2])}.0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{int(m[1]) * STEP + int(m[2])}.1"),
    (r"conv1", "in_layers.2"),
    (r"conv2", "out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
    (r"add_embedding\.linear_1", "label_emb.0.0"),
    (r"add_embedding\.linear_2", "label_emb.0.2"),
]
VAE_NAMES = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]
OPEN_CLIP_NAMES = [
    (r"embeddings\.token", "token"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"final_layer_norm", "ln_final"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
    (r"self_attn", "attn"),
]


def _rename(weights: dict[str, Tensor], names: list[Any], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in weights.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[prefix + key] = tensor.contiguous()
    return renamed


def _merge_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP keeps queries, keys and values in one matrix."""
    merged = {key: tensor for key, tensor in weights.items() if not re.search(r"[qkv]_proj", key)}
    for key in weights:
        if "q_proj" in key:
            parts = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            merged[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return merged


def original_layout(parts: dict[str, Any], text_prefix: str = "text_model.") -> dict[str, Tensor]:
    """The weights of a whole checkpoint; with a second text encoder, by the names of Stable Diffusion XL."""
    attends = hasattr(parts["unet"].up_blocks[0], "attentions")
    upsampler = [("UPSAMPLER", "2" if attends else "1")]
    two = "text_encoder_2" in parts
    text = _text(parts["text_encoder"], "conditioner.embedders.0." if two else "cond_stage_model.", text_prefix)
    return {
        **_rename(parts["unet"].state_dict(), UNET_NAMES + upsampler, "model.diffusion_model."),
        **_vae(parts["vae"]),
        **text,
        **(_text(parts["text_encoder_2"], "conditioner.embedders.1.", text_prefix) if two else {}),
        "model_ema.decay": torch.ones(()),
    }


def _vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The decoder's levels are counted from the image; the attention's projections are convolutions."""
    last = len(vae.config.block_out_channels) - 1
    counted = [(r"up_blocks\.(\d)", lambda m: f"up_blocks.{last - int(m[1])}")]
    renamed = _rename(vae.state_dict(), counted + VAE_NAMES, "first_stage_model.")
    return {key: t[..., None, None] if re.search(r"attn_1\.[qkvp].*weight", key) else t for key, t in renamed.items()}


def _text(encoder: Any, prefix: str, text_prefix: str) -> dict[str, Tensor]:
    weights = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    if encoder.config.hidden_act != "gelu":
        return {f"{prefix}transformer.{text_prefix}{key}": tensor for key, tensor in weights.items()}
    projection = weights.pop("text_projection.weight", None)
    more = {} if projection is None else {f"{prefix}model.text_projection": projection.T.contiguous()}
    return more | _rename(_merge_projections(weights), OPEN_CLIP_NAMES, f"{prefix}model.")


def tiny_parts(folder: Path, in_channels: int = 4, open_clip: bool = False) -> dict[str, Any]:
    """Random components of a tiny architecture, and their configurations in a folder."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(
            in_channels=in_channels,
            block_out_channels=(8, 16),
            layers_per_block=STEP - 1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=open_clip,
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=50,
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_act="gelu" if open_clip else "quick_gelu",
                bos_token_id=48,
                eos_token_id=49,
                pad_token_id=0,
            )
        ),
    }
    for name, part in parts.items():
        (part if name != "text_encoder" else part.config).save_pretrained(folder / name)
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
    DDIMScheduler().save_pretrained(folder / "scheduler")
    return parts
