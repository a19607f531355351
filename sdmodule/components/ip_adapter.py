"""Load an IP-Adapter, which lets a UNet attend to images beside the text (Ye et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from sdmodule.components.checkpoint import Components
from sdmodule.components.weights_file import SUFFIXES, read_nested_weights
from sdmodule.errors import SettingsError, choices

SECTIONS = ("image_proj", "ip_adapter")
"""The two parts of a file: the projection of the image, and the keys and values of each cross-attention."""


@dataclass
class ImagePrompts:
    """What turns an image into embeddings that the UNet attends to.

    Attributes:
        encoder: CLIP's image encoder.
        processor: resizes and normalizes images for it.
        pooled: whether the adapter takes the image's projected embedding; otherwise all hidden states.
    """

    encoder: CLIPVisionModelWithProjection
    processor: Any
    pooled: bool


def load_ip_adapter(path: str, encoder: str | None, parts: Components) -> None:
    """Add an IP-Adapter to a UNet, in place.

    Args:
        path: a ``.safetensors`` or ``.bin`` file, or one on the hub: ``owner/name/folder/file.safetensors``.
        encoder: folder or hub folder of the image encoder; by default ``image_encoder`` beside the file.
        parts: the model.

    Raises:
        SettingsError: if the file or the encoder cannot be read, or was made for another UNet.
    """
    weights = _sections(path)
    pooled = "proj.weight" in weights["image_proj"]
    vision = _load_encoder(path, encoder)
    try:
        parts.unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)  # diffusers' only way
        fits = _fits(parts.unet, vision, pooled)
    except (KeyError, RuntimeError, StopIteration) as error:
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(
            f"ip_adapter={path}: does not fit the UNet of pretrained={parts.source} ({reason}); give one for "
            f"{parts.family.title}."
        ) from error
    if not fits:
        raise SettingsError(
            f"ip_adapter={path}: was made for another image encoder, of other widths; give its folder as "
            "components.image_encoder=FOLDER."
        )
    size = vision.config.image_size
    # where it is a class of its own, the other one warns that torchvision is missing
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    parts.image_prompts = ImagePrompts(vision.eval().requires_grad_(False), processor, pooled)
    parts.unet.eval().requires_grad_(False)


def set_scale(unet: Any, scale: float) -> None:
    """How much images count beside the text."""
    for processor in unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = [scale]


@torch.no_grad()
def embed_images(prompts: ImagePrompts, images: list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings of images that are attended to together, and those that stand for no image.

    Args:
        prompts: the encoder.
        images: N PIL images.
        dtype: of the UNet.

    Returns:
        Each ``[N, D]``, or ``[N, tokens, D]`` where the adapter takes hidden states.
    """
    encoder = prompts.encoder
    pixels = prompts.processor(images, return_tensors="pt").pixel_values.to(encoder.device, encoder.dtype)
    if prompts.pooled:
        embedded = encoder(pixels).image_embeds
        return embedded.to(dtype), torch.zeros_like(embedded).to(dtype)
    seen, unseen = (
        encoder(each, output_hidden_states=True).hidden_states[-2] for each in (pixels, torch.zeros_like(pixels))
    )
    return seen.to(dtype), unseen.to(dtype)


def _sections(path: str) -> dict[str, dict[str, Tensor]]:
    file = Path(path).expanduser()
    if not file.is_file():
        file = _from_hub(path)
    weights = read_nested_weights(file, SECTIONS)
    if missing := [name for name in SECTIONS if not weights[name]]:
        raise SettingsError(f"ip_adapter={path}: has no {choices(missing)}, so it is no IP-Adapter; give one.")
    return weights


def _from_hub(path: str) -> Path:
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if path.startswith((".", "/", "~")) or not file.endswith(SUFFIXES):
        raise SettingsError(
            f"ip_adapter={path}: not found; give a {choices(SUFFIXES)} file, or one on the hub such as "
            "h94/IP-Adapter/models/ip-adapter_sd15.safetensors."
        )
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:  # of the hub, the system, or whatever HTTP client huggingface_hub uses today
        raise SettingsError(
            f"ip_adapter={path}: neither a local file nor available on the hub ({type(error).__name__})."
        ) from error


def _load_encoder(path: str, encoder: str | None) -> Any:
    beside = encoder or str(Path(path).expanduser().parent / "image_encoder")
    folder = Path(beside).expanduser()
    where = {} if folder.is_dir() else {"subfolder": "/".join(Path(beside).parts[2:])}
    location = str(folder) if folder.is_dir() else "/".join(Path(beside).parts[:2])
    try:
        if not folder.is_dir() and (Path(path).expanduser().is_file() or beside.startswith((".", "/", "~"))):
            raise FileNotFoundError(f"no folder {beside}")
        return CLIPVisionModelWithProjection.from_pretrained(location, use_safetensors=True, **where)
    except Exception as error:  # of transformers, the hub or the system
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"ip_adapter={path}: its image encoder cannot be read ({reason}); give its diffusers folder as "
            "components.image_encoder=FOLDER."
        ) from error


def _fits(unet: Any, vision: Any, pooled: bool) -> bool:
    """Whether the adapter takes embeddings as wide as the encoder's."""
    [projection] = unet.encoder_hid_proj.image_projection_layers
    if isinstance(projection, ImageProjection):
        return bool(projection.image_embeds.in_features == vision.config.projection_dim) and pooled
    first = next(weight for weight in projection.parameters() if weight.ndim == 2)
    return bool(vision.config.hidden_size in first.shape)
