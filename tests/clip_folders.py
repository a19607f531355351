"""Tiny CLIP-like models with random weights, saved as transformers saves real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}


def write_clip(folder: Path, tokenizer: Path) -> Path:
    """A CLIP of 16 dimensions, with a tokenizer's files."""
    text = _text(folder, tokenizer) | {"max_position_embeddings": 77}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    _name_processor(folder, "CLIPImageProcessor")
    return folder


def write_siglip(folder: Path, tokenizer: Path) -> Path:
    """A SigLIP of 32 dimensions, which reads 16 tokens."""
    text = _text(folder, tokenizer) | {"max_position_embeddings": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    _name_processor(folder, "SiglipImageProcessor")
    return folder


def _text(folder: Path, tokenizer: Path) -> dict[str, int]:
    shutil.copytree(tokenizer, folder)
    read = CLIPTokenizer.from_pretrained(folder)
    special = {name: getattr(read, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**TOWER, "vocab_size": len(read), **special}


def _name_processor(folder: Path, name: str) -> None:
    """Name the image processor as the published models do, whichever kind has saved it."""
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": name}))
