"""Adapters in peft's own layout: a folder for each network, with ``adapter_config.json`` and the weights.

They are read as the layout of diffusers, which is the same with the name of the part before each key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sdmodule.components.adapter_file import read_tensors, tensors_as
from sdmodule.components.adapter_layouts import METADATA, compiled
from sdmodule.components.folder_kinds import PEFT_CONFIG, PEFT_FILE, peft_folders
from sdmodule.components.lora_layers import Adapter, split_key
from sdmodule.errors import SettingsError, choices

PREFIX = "base_model.model."
METHODS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Methods of peft that are read, and what each calls its alpha."""

_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.")


def write_peft(adapter: Adapter, folder: Path, dtype: str) -> None:
    """Write a folder for each network that ``PeftModel.from_pretrained`` loads, with weights of ``dtype``."""
    for part, weights in adapter.weights.items():
        adapter.config(part).save_pretrained(str(folder / part))
        named = {f"{PREFIX}{key}": value for key, value in tensors_as(weights, dtype).items()}
        save_file(named, folder / part / PEFT_FILE, metadata={"format": "pt"})


def read_peft(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of an adapter, as diffusers writes them.

    Args:
        folder: of one network's adapter, or of several such folders.

    Raises:
        SettingsError: if a file cannot be read, or is of another method.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for own in peft_folders(folder) or [folder]:
        weights = {key.removeprefix(PREFIX): value for key, value in read_tensors(own / PEFT_FILE)[0].items()}
        config = _read_config(own)
        part = _part(own, config, weights)
        if f"{part}.lora_alpha" in settings:
            raise SettingsError(f"adapters={folder}: has several adapters of the {part}; give the folder of one.")
        _scale_full_products(weights, config, own)
        tensors |= {f"{part}.{key}": value for key, value in weights.items()}
        settings |= {
            f"{part}.lora_alpha": config[METHODS[config["peft_type"]]],
            f"{part}.alpha_pattern": config["alpha_pattern"],
            f"{part}.use_rslora": config.get("use_rslora"),
        }
    return tensors, {METADATA: json.dumps(settings)}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / PEFT_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        method = config["peft_type"]
        if method in METHODS:
            config[METHODS[method]], config["r"] = float(config[METHODS[method]]), max(int(config["r"]), 1)
            for name in ("alpha_pattern", "rank_pattern"):
                config[name] = {layer: float(value) for layer, value in (config.get(name) or {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(f"adapters={folder}: {PEFT_CONFIG} cannot be read ({error}); restore it.") from error
    if method not in METHODS:
        raise SettingsError(f"adapters={folder}: is of peft's method {method}; give one of {choices(METHODS)}.")
    return config


def _part(folder: Path, config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The network that an adapter is for: by its layers, by the class that peft notes, or by the folder's name."""
    if any(_UNET.match(key) for key in keys):
        return "unet"
    noted = config.get("auto_mapping")
    second = isinstance(noted, dict) and noted.get("base_model_class") == "CLIPTextModelWithProjection"
    return "text_encoder_2" if second or folder.name == "text_encoder_2" else "text_encoder"


def _scale_full_products(weights: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Scale the first matrix of each Kronecker product without a rank, as peft does and other layouts do not."""
    for key, value in weights.items():
        layer, factor = split_key(key)
        if factor == "lokr_w1" and f"{layer}.lokr_w2" in weights:
            alpha = _by_pattern(layer, config["alpha_pattern"], config["alpha"], folder)
            weights[key] = value * (alpha / _by_pattern(layer, config["rank_pattern"], config["r"], folder))


def _by_pattern(layer: str, patterns: Mapping[str, float], common: float, folder: Path) -> float:
    """The value of the first pattern that a layer's name ends with."""
    matching = (value for name, value in patterns.items() if compiled(name, str(folder)).match(layer))
    return next(matching, common)
