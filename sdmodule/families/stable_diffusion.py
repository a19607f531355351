"""Stable Diffusion 1.x and 2.x, for text-to-image and for inpainting (Rombach et al. 2022)."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from sdmodule.families.family import Family


class StableDiffusion(Family):
    """One text encoder, whose last hidden states the UNet attends to."""

    title = "Stable Diffusion 1.x and 2.x"
    pipelines = re.compile(
        r"(Flax|Onnx|Semantic)?StableDiffusion"
        r"(?!XL|3|Upscale|LatentUpscale|Depth2Img|ImageVariation|InstructPix2Pix|LDM3D)"  # take other inputs
        r"|Latent(Diffusion|ConsistencyModel)"
    )
    pipelines_in_words = "StableDiffusionPipeline and its inpainting, img2img and ControlNet variants"
    models: ClassVar = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    text_encoders: ClassVar = {"tokenizer": "text_encoder"}
    optional_parts = ("safety_checker", "feature_extractor", "image_encoder")
    adapter_prefixes: ClassVar = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")}
    adapter_headers = re.compile(r"sd_v[12]|stable-diffusion-v[12]")
    original_prefixes: ClassVar = {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.",
    }
    original_marks = ("cond_stage_model.",)
    original_configs: ClassVar = {
        (4, 768): "sd1",
        (9, 768): "sd1_inpaint",
        (4, 1024): "sd2",
        (9, 1024): "sd2_inpaint",
    }
    velocity_configs: ClassVar = {"sd2": "sd2_v"}
    text_widths: ClassVar = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
    guidance_scale = 7.5
    sharded_blocks = (BasicTransformerBlock, ResnetBlock2D, CLIPEncoderLayer)

    def pipeline(self, inpainting: bool, zero_empty_prompts: bool) -> dict[str, Any]:
        """The pipeline for text-to-image, or for inpainting."""
        name = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
        return {"_class_name": name, "requires_safety_checker": False}

    def architecture(self, width: int, inpainting: bool, prediction_type: str) -> tuple[str, str]:
        """Version 2 by its width of text, with the size that models which predict the velocity were made for."""
        if self.text_widths.get(width) != self.text_widths[1024]:
            return "stable-diffusion-v1" + "-inpainting" * inpainting, "https://github.com/CompVis/stable-diffusion"
        sizes = "inpainting" if inpainting else "768-v" if prediction_type == "v_prediction" else "512"
        return f"stable-diffusion-v2-{sizes}", "https://github.com/Stability-AI/stablediffusion"

    def encode(
        self, text_encoder: Any, tokens: Tensor, attention_mask: Tensor | None, clip_skip: int = 0
    ) -> tuple[Tensor, None]:
        """Last hidden states, or earlier ones with the last LayerNorm; nothing is pooled."""
        if not clip_skip:
            return text_encoder(tokens, attention_mask=attention_mask)[0], None
        output = text_encoder(tokens, attention_mask=attention_mask, output_hidden_states=True)
        last_norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
        return last_norm(output.hidden_states[-(clip_skip + 1)]), None
