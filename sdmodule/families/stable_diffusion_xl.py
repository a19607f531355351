"""Stable Diffusion XL, the base model (Podell et al. 2023, "SDXL: Improving Latent Diffusion Models…")."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from sdmodule.families.conditioning import Conditioning, ImageSizes
from sdmodule.families.family import Family

WIDTHS = {
    **{512: (1856, 1920, 1984, 2048), 576: (1664, 1728, 1792), 640: (1536, 1600), 704: (1344, 1408, 1472)},
    **{768: (1280, 1344), 832: (1152, 1216), 896: (1088, 1152), 960: (1024, 1088), 1024: (960, 1024)},
    **{1088: (896, 960), 1152: (832, 896), 1216: (832,), 1280: (768,), 1344: (768,), 1408: (704,)},
    **{1472: (704,), 1536: (640,), 1600: (640,), 1664: (576,), 1728: (576,), 1792: (576,)},
    **{1856: (512,), 1920: (512,), 1984: (512,), 2048: (512,)},
}
"""Widths in pixels of the training images of each height (appendix I of the paper)."""

TRAINED_SIZES = frozenset((height, width) for height, widths in WIDTHS.items() for width in widths)


class StableDiffusionXL(Family):
    """Two text encoders, and a UNet that is told the size of the image and the pooled prompt (section 2.2)."""

    title = "Stable Diffusion XL"
    pipelines = re.compile(
        r"StableDiffusionXL(|Img2Img|Inpaint|ControlNet|ControlNetImg2Img|ControlNetInpaint)Pipeline$"
    )
    pipelines_in_words = "StableDiffusionXLPipeline and its inpainting, img2img and ControlNet variants"
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
    word_keys: ClassVar = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    original_prefixes: ClassVar = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    }
    original_marks: ClassVar[tuple[str, ...]] = (
        "conditioner.embedders.",
        "model.diffusion_model.label_emb.0.",
        "label_emb.0.",
    )
    original_configs: ClassVar = {(4, 2048): "sdxl", (9, 2048): "sdxl_inpaint"}
    not_a_base: ClassVar = {
        (4, 1280): "the refiner of Stable Diffusion XL, which only takes over what its base model has begun"
    }
    text_widths: ClassVar = {2048: "Stable Diffusion XL"}
    guidance_scale = 5.0
    pools_text = True
    takes_sizes = True
    trained_sizes = TRAINED_SIZES
    upcasts_vae = True
    refinable = True
    sharded_blocks = (BasicTransformerBlock, ResnetBlock2D, CLIPEncoderLayer)

    def recognizes(self, index: Mapping[str, Any]) -> bool:
        """The pipeline is one of its own, but not that of the refiner."""
        return super().recognizes(index) and not self.is_refiner(index)

    @staticmethod
    def is_refiner(index: Mapping[str, Any]) -> bool:
        """Whether an index is that of the refiner: image-to-image with an aesthetic score."""
        name = index.get("_class_name")
        return name == "StableDiffusionXLImg2ImgPipeline" and bool(index.get("requires_aesthetics_score"))

    def zeroes_empty_prompts(self, index: Mapping[str, Any]) -> bool:
        """What ``force_zeros_for_empty_prompt`` says; true if left out, as in diffusers."""
        return bool(index.get("force_zeros_for_empty_prompt", True))

    def pipeline(self, inpainting: bool, zero_empty_prompts: bool) -> dict[str, Any]:
        """The pipeline for text-to-image, or for inpainting."""
        name = "StableDiffusionXLInpaintPipeline" if inpainting else "StableDiffusionXLPipeline"
        return {"_class_name": name, "force_zeros_for_empty_prompt": zero_empty_prompts}

    def architecture(self, width: int, inpainting: bool, prediction_type: str) -> tuple[str, str]:
        """The base model, or its variant for inpainting."""
        name = "stable-diffusion-xl-v1-" + ("inpainting" if inpainting else "base")
        return name, "https://github.com/Stability-AI/generative-models"

    def encode(
        self, text_encoder: Any, tokens: Tensor, attention_mask: Tensor | None, clip_skip: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the last layer but one; the second encoder projects its end token as the pooled prompt."""
        output = text_encoder(tokens, attention_mask=attention_mask, output_hidden_states=True)
        return output.hidden_states[-(clip_skip + 2)], getattr(output, "text_embeds", None)

    def time_ids(self, sizes: Sequence[ImageSizes]) -> Tensor:
        """Original size, crop and target size of each image (section 2.2)."""
        return torch.tensor([[*one.original, *one.crop, *one.target] for one in sizes], dtype=torch.float32)

    def unused_layers(self, part: str, network: Any) -> list[Any]:
        """Behind the last layer but one, the first text encoder is not asked for anything."""
        if part != "text_encoder":
            return []
        model = getattr(network, "text_model", network)
        return [model.encoder.layers[-1], model.final_layer_norm]

    def denoiser_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """The text, and beside it the pooled prompt and the sizes."""
        arguments = super().denoiser_arguments(conditioning)
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        return arguments | {"added_cond_kwargs": added | arguments.get("added_cond_kwargs", {})}
