"""Adapter files, written in the layouts of diffusers and of kohya's scripts, which web UIs read.

`peft_layout` writes that of peft. `adapter_layouts` reads these and others. Adapters are shared between strangers, so
only safetensors files are read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdmodule.components.adapter_layouts import KOHYA_NAMES, METADATA
from sdmodule.components.checkpoint import Components
from sdmodule.components.folder_kinds import DIFFUSERS_FILE, KOHYA_FILE
from sdmodule.components.lora_layers import MAGNITUDES, Adapter
from sdmodule.components.modelspec import modelspec
from sdmodule.components.original_names import unet_layer
from sdmodule.errors import SettingsError


def write_diffusers(adapter: Adapter, folder: Path, dtype: str) -> None:
    """Write the file that ``StableDiffusionPipeline.load_lora_weights`` looks for, with weights of ``dtype``."""
    weights, settings = {}, {}
    for part in adapter.weights:
        for key, value in adapter.weights[part].items():
            # diffusers hands a text encoder's keys to transformers, which only knows DoRA's magnitudes by this name
            suffix = ".weight" if part != "unet" and key.endswith(MAGNITUDES) else ""
            weights[f"{part}.{_full_name(part, key)}{suffix}"] = value
        config = adapter.config(part).to_dict()
        for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora"):
            value = config[name]
            settings[f"{part}.{name}"] = sorted(value) if isinstance(value, (set, list)) else value
    metadata = {"format": "pt", METADATA: json.dumps(settings)}
    save_file(tensors_as(weights, dtype), folder / DIFFUSERS_FILE, metadata=metadata)


def write_kohya(adapter: Adapter, folder: Path, dtype: str, parts: Components) -> None:
    """Write the layout of kohya's scripts and of LyCORIS, with weights of ``dtype``; ``parts`` is what it is for."""
    weights = {}
    for part in adapter.weights:
        for layer, factors in adapter.layers(part).items():
            original = part == "unet" and parts.family.original_adapter_names
            name = (unet_layer(layer, parts.unet) if original else None) or _full_name(part, layer)
            flat = f"{parts.family.adapter_prefixes[part][0]}_{name}".replace(".", "_")
            for factor, value in factors.items():
                if factor == MAGNITUDES:
                    value = value.reshape(len(value.flatten()), *[1] * (factors["lora_A.weight"].ndim - 1))
                weights[f"{flat}.{KOHYA_NAMES.get(factor, factor)}"] = value
            if (alpha := adapter.alphas.get(part, {}).get(layer)) is not None:
                weights[f"{flat}.alpha"] = torch.tensor(alpha)
    cast = tensors_as(weights, dtype)
    save_file(cast, folder / KOHYA_FILE, metadata={"format": "pt", **modelspec(parts, cast, "/lora")})


def _full_name(part: str, name: str) -> str:
    """A layer's name with the prefix of text encoders, which transformers 5 leaves out and other tools expect."""
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def tensors_as(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors as ``dtype``, in the memory layout that files have."""
    return {key: value.to(getattr(torch, dtype)).contiguous() for key, value in weights.items()}


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a ``.safetensors`` file.

    Raises:
        SettingsError: if it is missing, not a ``.safetensors`` file, or corrupt.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(
            f"adapters={path}: not found; give a .safetensors file, or the export folder of a training run."
        )
    if file.suffix != ".safetensors":
        raise SettingsError(
            f"adapters={path}: not a .safetensors file, and any other kind may run code when it is loaded; convert it."
        )
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingsError(f"adapters={path}: cannot be read ({error}); download or export the file again.") from error
