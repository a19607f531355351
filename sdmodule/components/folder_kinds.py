"""What a folder holds by the files in it: a whole checkpoint, an adapter, a ControlNet, or the run of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdmodule.errors import SettingsError

INDEX = "model_index.json"
"""File that marks a folder as a diffusers checkpoint."""

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
EMBEDDING_FILE = "learned_embeds.safetensors"
ADAPTER_FILES = (DIFFUSERS_FILE, KOHYA_FILE, EMBEDDING_FILE)
"""Files of a folder with an adapter or a learned word, in the order in which they are looked for."""

PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
"""Files in the folder of an adapter in peft's own layout, one folder for each network."""

SINGLE_FILE = "model.safetensors"
"""A whole checkpoint in the original layout, in a folder of its own; its configurations are in ``model/`` beside it."""

EXPORT = "export"
"""Folder of what a training exported, in the folder of its run."""


def read_index(file: Path, setting: str) -> dict[str, Any]:
    """What the index of a checkpoint says.

    Args:
        file: its ``model_index.json``.
        setting: what named the checkpoint, such as ``pretrained=tiny``.

    Raises:
        SettingsError: if it cannot be read.
    """
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{setting}: its {INDEX} cannot be read ({error}); restore it.") from error
    return index if isinstance(index, dict) else {}


def not_a_checkpoint(folder: Path, name: str, key: str) -> SettingsError:
    """The error for a folder without an index that was given as a checkpoint: what it is, and what it is good for.

    Args:
        folder: the folder.
        name: how it was given.
        key: the setting that named it, such as ``pretrained``.
    """
    if folder.name == "checkpoints":
        folder, name = folder.parent, str(Path(name).parent)
    export, given = folder / EXPORT, f"{key}={name}"
    if use := how_to_use(folder, name, key):
        return SettingsError(f"{given}: {use}.")
    if use := how_to_use(export, f"{name.rstrip('/')}/{EXPORT}", key):
        return SettingsError(f"{given}: is the folder of a training; its {EXPORT}/ {use}.")
    if (folder / "checkpoints").is_dir():
        return SettingsError(
            f"{given}: is the folder of a training without an {EXPORT}/, which is written at its end; resume it with "
            f"output_dir={name} ckpt_path=last."
        )
    if (folder.absolute().parent / INDEX).is_file():
        return SettingsError(f"{given}: is one part of a checkpoint; give {key}={Path(name).parent}.")
    return SettingsError(f"{given}: the folder has no {INDEX}; give the folder of a whole diffusers checkpoint.")


def how_to_use(folder: Path, name: str, key: str = "pretrained") -> str:
    """What a folder holds and which setting takes it, or an empty text if it holds nothing that is known.

    Args:
        folder: the folder.
        name: how to write it.
        key: the setting that takes a whole checkpoint.
    """
    if (folder / INDEX).is_file():
        return f"is a whole checkpoint; give {key}={name}"
    if (folder / SINGLE_FILE).is_file() and ((folder / SINGLE_FILE).with_suffix("") / INDEX).is_file():
        return f"is a whole checkpoint in one file; give {key}={name.rstrip('/')}/{SINGLE_FILE}"
    if (folder / EMBEDDING_FILE).is_file():
        return f"is a learned word; give adapters={name} beside the checkpoint that it was learned on"
    if any((folder / file).is_file() for file in ADAPTER_FILES) or peft_folders(folder):
        return f"is an adapter; give adapters={name} beside the checkpoint that it was trained on"
    config = folder / "config.json"
    if config.is_file() and read_index(config, f"{key}={name}").get("_class_name") == "ControlNetModel":
        return f"is a ControlNet; give controlnet={name} beside the checkpoint that it was trained on"
    if (folder / "vae.safetensors").is_file():
        return f"is an autoencoder; give components.vae={name.rstrip('/')}/vae.safetensors beside a whole checkpoint"
    if (folder / "vae" / "config.json").is_file() and not (folder / "unet").is_dir():
        return f"is an autoencoder; give components.vae={name} beside a whole checkpoint"
    return ""


def peft_folders(folder: Path) -> list[Path]:
    """The folders in peft's layout: this one, or those of single networks in it."""
    if (folder / PEFT_CONFIG).is_file():
        return [folder]
    return sorted(file.parent for file in folder.glob(f"*/{PEFT_CONFIG}")) if folder.is_dir() else []
