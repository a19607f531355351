"""Stable Diffusion XL, the base model (Podell et al. 2023, "SDXL: Improving Latent Diffusion Models…")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdmodule.families.conditioning import Conditioning, ImageSizes
from sdmodule.families.family import CONTROLNET, INPAINT, LEARNED_WORDS, TRAINING, Family


class StableDiffusionXL(Family):
    """Two text encoders, and a UNet that is told the size of the image and the pooled prompt (section 2.2)."""

    title = "Stable Diffusion XL"
    pipelines = re.compile(r"StableDiffusionXLPipeline$")
    pipelines_in_words = "StableDiffusionXLPipeline"
    models: ClassVar = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    text_encoders: ClassVar = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    optional_parts = ("feature_extractor", "image_encoder")
    other_inputs: ClassVar = {"unet": {"addition_embed_type": "text_time"}}
    adapter_prefixes: ClassVar = {
        "unet": ("lora_unet",),
        "text_encoder": ("lora_te1",),
        "text_encoder_2": ("lora_te2",),
    }
    original_adapter_names = True
    adapter_headers = re.compile(r"sdxl|stable-diffusion-xl")
    original_prefixes: ClassVar = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    }
    original_marks = ("conditioner.embedders.", "model.diffusion_model.label_emb.0.", "label_emb.0.")
    original_configs: ClassVar = {(4, 2048): "sdxl", (9, 2048): "sdxl_inpaint"}
    not_a_base: ClassVar = {
        (4, 1280): "the refiner of Stable Diffusion XL, which only takes over what its base model has begun"
    }
    text_widths: ClassVar = {2048: "Stable Diffusion XL", 1280: "the refiner of Stable Diffusion XL"}
    guidance_scale = 5.0
    upcasts_vae = True
    unsupported = frozenset({TRAINING, INPAINT, CONTROLNET, LEARNED_WORDS})

    def zeroes_empty_prompts(self, index: Mapping[str, Any]) -> bool:
        """What ``force_zeros_for_empty_prompt`` says; true if left out, as in diffusers."""
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def pipeline(self, inpainting: bool, zero_empty_prompts: bool) -> dict[str, Any]:
        """The pipeline for text-to-image."""
        return {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": zero_empty_prompts}

    def architecture(self, width: int, inpainting: bool, prediction_type: str) -> tuple[str, str]:
        """The base model, or its variant for inpainting."""
        name = "stable-diffusion-xl-v1-" + ("inpainting" if inpainting else "base")
        return name, "https://github.com/Stability-AI/generative-models"

    def encode(self, text_encoder: Any, tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the last layer but one; the second encoder projects its end token as the pooled prompt."""
        output = text_encoder(tokens, attention_mask=attention_mask, output_hidden_states=True)
        return output.hidden_states[-2], getattr(output, "text_embeds", None)

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[ImageSizes]) -> Conditioning:
        """Original size, crop and target size of each image (section 2.2)."""
        rows = [[*one.original, *one.crop, *one.target] for one in sizes]
        device = conditioning.hidden_states.device
        return replace(conditioning, time_ids=torch.tensor(rows, dtype=torch.float32, device=device))

    def denoiser_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """The text, and beside it the pooled prompt and the sizes."""
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        return {**super().denoiser_arguments(conditioning), "added_cond_kwargs": added}
