"""A tiny checkpoint with the architecture of Stable Diffusion XL and random weights, and its pipeline of diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdmodule.components.checkpoint import Components
from sdmodule.components.schedulers import make_scheduler
from sdmodule.data.toy.tokenizer import scene_captions, write_tokenizer
from sdmodule.families.stable_diffusion_xl import StableDiffusionXL
from sdmodule.families.stable_diffusion_xl_refiner import StableDiffusionXLRefiner

POOLED, SIZE = 24, 8
"""Widths of the pooled prompt, and of the embedding of each of the six sizes."""


def tiny_xl_parts(folder: Path) -> Components:
    """Parts for 32 x 32 pixels; the widths of the two text encoders differ, and so do their padding tokens."""
    write_tokenizer(folder / "words", scene_captions(200), size=1024)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "words", pad_token="!")
    return Components(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE,
            projection_class_embeddings_input_dim=POOLED + 6 * SIZE,
            norm_num_groups=8,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.13025,
            force_upcast=True,
        ),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 32)),
        text_encoder_2=CLIPTextModelWithProjection(
            _text_config(tokenizer_2, 48, hidden_act="gelu", projection_dim=POOLED)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        source=str(folder),
        guidance_scale=StableDiffusionXL.guidance_scale,
        family=StableDiffusionXL(),
        zero_empty_prompts=True,
    )


def tiny_refiner_parts(base: Components) -> Components:
    """A refiner for `tiny_xl_parts`: the second text encoder alone, and five numbers beside it."""
    config = dict(base.unet.config) | {
        "cross_attention_dim": 48,
        "projection_class_embeddings_input_dim": POOLED + 5 * SIZE,
    }
    return replace(
        base,
        unet=UNet2DConditionModel.from_config(config),
        text_encoder=None,
        tokenizer=None,
        family=StableDiffusionXLRefiner(),
        zero_empty_prompts=False,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def xl_pipeline(
    folder: Path | str, scheduler: Any = None, kind: Any = StableDiffusionXLPipeline, **changes: Any
) -> Any:
    """The pipeline that diffusers makes of a checkpoint's folder, with the scheduler that ``infer`` would take."""
    pipeline = kind.from_pretrained(folder, add_watermarker=False, torch_dtype=torch.float32, **changes)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
