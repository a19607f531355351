"""Configurations and the tokenizer of the published models, which ship with the package: single files have neither."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from sdmodule.components.original_layout import has_open_clips_activation
from sdmodule.components.weights_file import Weights
from sdmodule.errors import SettingsError, choices
from sdmodule.families.family import Family

CONFIGS = Path(__file__).parent / "assets" / "configs"

CONV_IN = "input_blocks.0.0.weight"
TEXT_KEYS = "attn2.to_k.weight"


def choose_config(path: Path, family: Family, unet: Weights) -> str:
    """Name of the shipped configuration with the shapes of a UNet.

    Raises:
        SettingsError: if there is none.
    """
    channels, width = _shapes(unet)
    name = family.original_configs.get((channels, width))
    if name is None:
        known = ", ".join(f"{channels} with {width}" for channels, width in family.original_configs)
        raise SettingsError(
            f"{path}: the UNet has {channels} input channels and text width {width}; those of {family.title} have "
            f"{known}; give the diffusers folder of its architecture as config."
        )
    return name


def check_base(path: Path, family: Family, unet: Weights) -> None:
    """Check that a UNet can sample on its own, as far as it is there.

    Raises:
        SettingsError: if it cannot.
    """
    if CONV_IN in unet and (what := family.not_a_base.get(_shapes(unet))):
        raise SettingsError(f"{path}: is {what}; give a checkpoint of the base model.")


def has_shapes_of(family: Family, unet: Weights) -> bool:
    """Whether a UNet has the shapes of a published model of a family."""
    return CONV_IN in unet and _shapes(unet) in family.original_configs


def _shapes(unet: Weights) -> tuple[int, int]:
    """A UNet's input channels, and the width of the text embeddings."""
    width = next((tensor.shape[-1] for key, tensor in unet.items() if key.endswith(TEXT_KEYS) and tensor.ndim), 0)
    return (unet[CONV_IN].shape[1] if unet[CONV_IN].ndim > 1 else 0), width


def config_of_part(family: Family, name: str, weights: Weights) -> Path:
    """The shipped configuration of a part alone: of a text encoder by its width; the autoencoders are the same."""
    folders = [CONFIGS / config for config in family.original_configs.values()]
    if not name.startswith("text_encoder"):
        return folders[0]
    embeddings = (tensor for key, tensor in weights.items() if "token_embedding" in key and tensor.ndim)
    width = next((tensor.shape[-1] for tensor in embeddings), None)
    fits = (folder for folder in folders if _encoder_config(folder, name).hidden_size == width)
    return next(fits, folders[0])


def check_config(config: Path, family: Family) -> Path:
    """Check that a folder has a configuration of each network and of the scheduler.

    Raises:
        SettingsError: if it lacks one.
    """
    missing = [name for name in (*family.models, "scheduler") if not (Path(config) / name).is_dir()]
    if missing:
        raise SettingsError(
            f"config={config}: has no {choices(missing)}; give a local diffusers folder of the file's architecture."
        )
    return Path(config)


def load_tokenizer(folder: Path, name: str, encoder: str) -> CLIPTokenizer:
    """The tokenizer of a configuration's folder, or CLIP's, which pads for OpenCLIP's encoders with id 0."""
    if (folder / name).is_dir():
        return CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
    return load_clip_tokenizer("!" if has_open_clips_activation(_encoder_config(folder, encoder)) else "<|endoftext|>")


def _encoder_config(folder: Path, name: str) -> Any:
    return SimpleNamespace(**json.loads((folder / name / "config.json").read_text()))


def load_clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Build CLIP's tokenizer from the merges that ship with the package.

    Args:
        pad_token: for text encoders of OpenAI's it is ``<|endoftext|>``, for OpenCLIP's ``!`` (id 0).

    Returns:
        A tokenizer with a vocabulary of 49,408 and a maximum length of 77.
    """
    lines = (CONFIGS / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges: list[Any] = [tuple(line.split()) for line in lines]
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def stated_prediction(header: Mapping[str, str], keys: Collection[str]) -> str | None:
    """What a file says that its UNet predicts, by the modelspec convention or by a key ``v_pred``; None if nothing."""
    if header.get("modelspec.prediction_type") == "v" or "v_pred" in keys:
        return "v_prediction"
    return "epsilon" if header.get("modelspec.prediction_type") == "epsilon" else None


@torch.no_grad()
def predicts_noise(unet: Callable[..., Any], in_channels: int, cross_attention_dim: int) -> bool:
    """Measure whether a UNet predicts the noise (epsilon) or the velocity (v).

    Both have the same shapes, but differ at the last timestep: its latents are nearly pure noise, so a network that
    predicts the noise returns its input, while v is the negated image (Salimans and Ho 2022, appendix D).

    Args:
        unet: called as ``unet(latents, timestep, encoder_hidden_states)``.
        in_channels: channels of the latents.
        cross_attention_dim: width of the text embeddings.

    Returns:
        Whether output and input have a correlation above one half.
    """
    noise = torch.randn(1, in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    predicted = unet(noise, 999, encoder_hidden_states=torch.zeros(1, 77, cross_attention_dim)).sample
    return torch.corrcoef(torch.stack([noise.flatten(), predicted.flatten()]))[0, 1].item() > 0.5
