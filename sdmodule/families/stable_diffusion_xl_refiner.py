"""The refiner of Stable Diffusion XL, a model for the last, least noisy steps (Podell et al. 2023, section 2.5)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from sdmodule.families.conditioning import ImageSizes
from sdmodule.families.stable_diffusion_xl import StableDiffusionXL

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What the UNet is told of an image's beauty, of 10, with the prompt and with the negative one; diffusers' defaults."""


class StableDiffusionXLRefiner(StableDiffusionXL):
    """One text encoder, the second of the base model, and an aesthetic score in place of the target size."""

    title = "the refiner of Stable Diffusion XL"
    pipelines_in_words = "StableDiffusionXLImg2ImgPipeline with requires_aesthetics_score"
    models: ClassVar = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    text_encoders: ClassVar = {"tokenizer_2": "text_encoder_2"}
    optional_parts = ("text_encoder", "tokenizer")
    adapter_prefixes: ClassVar = {"unet": ("lora_unet",), "text_encoder_2": ("lora_te2",)}
    adapter_headers = re.compile(r"stable-diffusion-xl-v1-refiner")
    original_prefixes: ClassVar = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder_2": "conditioner.embedders.0.",
    }
    original_marks: ClassVar = ()  # its keys are those of the base model
    original_configs: ClassVar = {(4, 1280): "sdxl_refiner"}
    not_a_base: ClassVar = {}
    text_widths: ClassVar = {1280: "the refiner of Stable Diffusion XL"}
    refines = True
    refinable = False

    def recognizes(self, index: Mapping[str, Any]) -> bool:
        """The pipeline is that of image-to-image, and takes aesthetic scores."""
        return self.is_refiner(index)

    def pipeline(self, inpainting: bool, zero_empty_prompts: bool) -> dict[str, Any]:
        """The pipeline for image-to-image."""
        return {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "requires_aesthetics_score": True,
            "force_zeros_for_empty_prompt": zero_empty_prompts,
        }

    def architecture(self, width: int, inpainting: bool, prediction_type: str) -> tuple[str, str]:
        """The refiner."""
        return "stable-diffusion-xl-v1-refiner", "https://github.com/Stability-AI/generative-models"

    def time_ids(self, sizes: Sequence[ImageSizes]) -> Tensor:
        """Original size, crop and aesthetic score of each image."""
        scores = [NEGATIVE_AESTHETIC_SCORE if one.negative else AESTHETIC_SCORE for one in sizes]
        rows = [[*one.original, *one.crop, score] for one, score in zip(sizes, scores, strict=True)]
        return torch.tensor(rows, dtype=torch.float32)
