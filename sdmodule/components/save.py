"""Write a checkpoint as a folder that diffusers' pipelines load, or its configurations alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdmodule.components.checkpoint import Components
from sdmodule.components.checkpoint_checks import SAMPLING
from sdmodule.components.folder_kinds import INDEX
from sdmodule.components.inpaint_unet import is_inpaint_unet
from sdmodule.components.learned_words import check_no_words
from sdmodule.io.progress import LONG_TASK, progress


def save_components(parts: Components, folder: str | Path, dtype: str = "float32") -> None:
    """Write a folder that diffusers' Stable Diffusion pipelines load, with weights of ``dtype``.

    Raises:
        SettingsError: if a word was added to a text encoder.
    """
    check_no_words(encoder for _, encoder in parts.text_encoders)
    folder = Path(folder)
    sizes = {name: megabytes(model, dtype) for name, model in parts.networks.items()}
    with progress(sum(sizes.values()), "writing weights, in MB", delay=LONG_TASK) as on_done:
        for name in parts.family.parts:
            save_part(name, getattr(parts, name), folder, dtype)
            on_done(sizes.get(name, 0))
    _save_index(parts, folder)


def save_configs(parts: Components, folder: Path) -> None:
    """Write the same folder without the weights."""
    for name in parts.family.parts:
        save_config(name, getattr(parts, name), folder / name)
    _save_index(parts, folder)


def _save_index(parts: Components, folder: Path) -> None:
    pipeline = parts.family.pipeline(is_inpaint_unet(parts.unet), parts.zero_empty_prompts)
    index: dict[str, Any] = {"_class_name": pipeline.pop("_class_name"), "_diffusers_version": diffusers.__version__}
    index |= pipeline | {name: _library_and_class(getattr(parts, name)) for name in parts.family.parts}
    index |= {name: [None, None] for name in parts.family.optional_parts}
    (folder / SAMPLING).write_text(json.dumps({"guidance_scale": parts.guidance_scale}) + "\n")
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def megabytes(model: nn.Module, dtype: str) -> int:
    """Size of a model's weights as ``dtype``, at least 1."""
    bytes_each = getattr(torch, dtype).itemsize
    return max(1, round(sum(weight.numel() for weight in model.parameters()) * bytes_each / 1e6))


def save_part(name: str, part: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write one part to ``folder/name``."""
    subfolder = Path(folder) / name
    if not isinstance(part, nn.Module):
        save_config(name, part, subfolder)
    elif name.startswith("text_encoder"):
        save_config(name, part, subfolder)
        # transformers 5 leaves out the prefix that every other reader of these files expects
        weights = {
            key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
            for key, value in _weights_as(part, dtype).items()
        }
        save_file(weights, subfolder / "model.safetensors", metadata={"format": "pt"})
    else:
        save_model(part, subfolder, dtype)


def save_config(name: str, part: Any, folder: Path) -> None:
    """Write the configuration of one part, or all of a part that has no weights, to a folder of its own."""
    if name == "scheduler":
        save_scheduler(part, folder)
    elif name.startswith("tokenizer"):
        part.save_pretrained(folder)
        part.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, which older readers need
    elif name.startswith("text_encoder"):
        part.config.save_pretrained(folder)
    else:
        config_file = folder / "config.json"
        part.save_config(folder)
        config = json.loads(config_file.read_text())
        config.pop("_name_or_path", None)  # a path of the machine that it was read on
        config_file.write_text(json.dumps(config, indent=2) + "\n")


def save_scheduler(scheduler: Any, folder: str | Path) -> None:
    """Write a scheduler's configuration.

    diffusers' pipelines take any ``steps_offset`` but 1 for outdated: they warn, and sample with 1. It counts for
    ``leading`` timesteps alone, so with others it is written as 1, which changes no image.
    """
    config = {**scheduler.config}
    if config.get("steps_offset", 1) != 1 and config.get("timestep_spacing", "leading") != "leading":
        scheduler = type(scheduler).from_config(config, steps_offset=1)
    scheduler.save_pretrained(folder)


def save_model(model: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write a diffusers model to a folder of its own."""
    save_config("model", model, Path(folder))
    save_file(
        _weights_as(model, dtype), Path(folder) / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
    )


def _weights_as(model: nn.Module, dtype: str) -> dict[str, Tensor]:
    return {key: value.to(getattr(torch, dtype)).contiguous() for key, value in model.state_dict().items()}


def _library_and_class(part: Any) -> list[str]:
    return [type(part).__module__.split(".")[0], type(part).__name__]
