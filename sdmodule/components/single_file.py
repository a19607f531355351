"""Load Stable Diffusion 1.x and 2.x from a single file in the original layout, without a network.

diffusers converts the keys. This module adds the configurations, which ship with the package, chooses among them, and
says what a file holds if it is not such a checkpoint.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextModel, CLIPTokenizer

from sdmodule.errors import SettingsError, check_choice, choices

CONFIGS = Path(__file__).parent / "assets" / "configs"
PREDICTION_TYPES = ("epsilon", "v_prediction")

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_KEYS = "attn2.to_k.weight"

READERS: dict[str, Callable[..., torch.nn.Module]] = {
    "unet": UNet2DConditionModel.from_single_file,
    "vae": AutoencoderKL.from_single_file,
    "text_encoder": partial(create_diffusers_clip_model_from_ldm, CLIPTextModel),
}

Weights = dict[str, torch.Tensor]

CONFIG_BY_SHAPE = {(4, 768): "sd1", (9, 768): "sd1_inpaint", (4, 1024): "sd2", (9, 1024): "sd2_inpaint"}
"""Folder of the configuration, by the UNet's input channels and the width of the text embeddings."""

FOREIGN = {
    "lora": "a LoRA",
    "hada_w": "a LyCORIS adapter",
    "unet.down_blocks.": "a training checkpoint (sample from the export/ of the run instead)",
    "control_model.": "a ControlNet",
    "conditioner.embedders.": "a Stable Diffusion XL checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "down_blocks.": "one component in the diffusers layout, which is read from its folder",
}
"""Parts of keys that only other kinds of files have; the error reports the first that matches."""

# at every cast diffusers 0.42 warns about an empty list of modules kept in float32
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "kept in float32: []" not in record.getMessage()
)


class _CallbackKey:
    """Placeholder for a class that old `.ckpt` files use as the key of a callback's state and never call."""


SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_CallbackKey, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
]


def load_single_file(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    config: Path | None = None,
    prediction_type: str | None = None,
) -> dict[str, Any]:
    """Load the components of a Stable Diffusion checkpoint in the original layout.

    The raw weights are loaded; EMA weights beside them, under ``model_ema.``, are ignored.

    Args:
        path: a ``.safetensors`` or ``.ckpt`` file. A ``.ckpt`` is loaded as weights only: nothing in it is executed.
        dtype: type of all weights, by default float32.
        config: local diffusers folder of the file's architecture; by default chosen from the shapes.
        prediction_type: what the UNet predicts; by default measured for 2.x (see `predicts_noise`), and the noise for
            1.x and inpainting models.

    Returns:
        ``unet``, ``vae`` and ``text_encoder`` in evaluation mode, ``tokenizer``, and ``scheduler`` (DDIM).

    Raises:
        SettingsError: if the file or an argument cannot be used.
    """
    dtype = dtype or torch.float32
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    weights = _read_weights(Path(path))
    _check_parts(path, weights)
    folder = _check_config(config) if config else _choose_config(path, weights, prediction_type)

    scheduler = DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
    if prediction_type:
        scheduler["prediction_type"] = prediction_type
    return {
        **{name: _load_model(path, name, weights, folder, dtype) for name in PREFIXES},
        "tokenizer": _load_tokenizer(folder, weights),
        "scheduler": DDIMScheduler.from_config(scheduler),
    }


def load_clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Build CLIP's tokenizer from the merges that ship with the package.

    Args:
        pad_token: Stable Diffusion 1.x pads with ``<|endoftext|>``, 2.x with ``!`` (id 0).

    Returns:
        A tokenizer with a vocabulary of 49,408 and a maximum length of 77.
    """
    lines = (CONFIGS / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges: list[Any] = [tuple(line.split()) for line in lines]
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


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


def _read_weights(path: Path) -> Weights:
    """Map the tensors of a file into memory; pages are read on use."""
    if not path.is_file():
        raise SettingsError(f"{path}: not found; give the path of a .safetensors or .ckpt file.")
    match path.suffix.lower():
        case ".safetensors":
            try:
                weights = load_file(path)
            except (SafetensorError, OSError) as error:
                raise SettingsError(f"{path}: corrupt or incomplete ({error}); download or export it again.") from error
        case ".ckpt":
            weights = _read_pickle(path)
        case suffix:
            raise SettingsError(f"{path}: unknown suffix {suffix}; give a .safetensors or .ckpt file.")
    # transformers 5 writes text encoders without the prefix that the original layout has
    return {
        key.replace(CLIP, f"{CLIP}text_model.") if key.startswith(CLIP) and "text_model." not in key else key: tensor
        for key, tensor in weights.items()
    }


def _read_pickle(path: Path) -> Weights:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a corrupt or hostile pickle may raise anything
        raise SettingsError(
            f"{path}: cannot be loaded as weights only, since it is corrupt or wants to run code, which is refused; "
            "give a .safetensors version of it."
        ) from error
    while isinstance(saved, dict) and "state_dict" in saved:
        saved = saved["state_dict"]
    if not isinstance(saved, dict):
        raise SettingsError(f"{path}: holds a {type(saved).__name__} instead of named weights; give a full checkpoint.")
    return {key: value for key, value in saved.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _check_parts(path: Path, weights: Iterable[str]) -> None:
    """Check that a file has the keys of a UNet, an autoencoder and a text encoder."""
    missing = [part for part, prefix in PREFIXES.items() if not any(key.startswith(prefix) for key in weights)]
    if not missing and CONV_IN in weights:
        return
    found = next((kind for mark, kind in FOREIGN.items() if any(mark in key for key in weights)), None)
    if not found and len(missing) < len(PREFIXES):
        found = f"a checkpoint without {' and '.join(missing) or CONV_IN}"
    elif not found:
        found = f"an unknown kind of file ({', '.join(sorted(weights)[:3]) or 'no weights'})"
    raise SettingsError(
        f"{path}: is {found}; give a full Stable Diffusion 1.x or 2.x checkpoint in the original layout."
    )


def _choose_config(path: Path, weights: Weights, prediction_type: str | None) -> Path:
    """Choose the shipped configuration by the shapes and, for 2.x, by what the UNet predicts."""
    channels = weights[CONV_IN].shape[1]
    width = next((tensor.shape[-1] for key, tensor in weights.items() if key.endswith(TEXT_KEYS)), 0)
    name = CONFIG_BY_SHAPE.get((channels, width))
    if not name:
        raise SettingsError(
            f"{path}: the UNet has {channels} input channels and text width {width}; known are 4 or 9 channels with "
            "width 768 (1.x) or 1024 (2.x); give the diffusers folder of its architecture as config."
        )
    if name == "sd2" and prediction_type is None:
        unet = _load_model(path, "unet", weights, CONFIGS / name, torch.float32)
        prediction_type = "epsilon" if predicts_noise(unet, channels, width) else "v_prediction"
    return CONFIGS / ("sd2_v" if (name, prediction_type) == ("sd2", "v_prediction") else name)


def _check_config(config: Path) -> Path:
    missing = [name for name in (*PREFIXES, "scheduler") if not (Path(config) / name).is_dir()]
    if missing:
        raise SettingsError(
            f"config={config}: has no {choices(missing)}; give a local diffusers folder of the file's architecture."
        )
    return Path(config)


def _load_tokenizer(folder: Path, weights: Iterable[str]) -> CLIPTokenizer:
    if (folder / "tokenizer").is_dir():
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return load_clip_tokenizer("!" if any(key.startswith(OPEN_CLIP) for key in weights) else "<|endoftext|>")


def _load_model(path: Path, name: str, weights: Weights, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load one model, and check that the file holds every weight of its architecture, in its shape."""
    source = {"config": str(folder), "subfolder": name, "torch_dtype": dtype, "local_files_only": True}
    selected = {key: tensor for key, tensor in weights.items() if key.startswith(PREFIXES[name])}
    try:
        model = READERS[name](selected, **source)
        complete = not any(weight.is_meta for weight in model.parameters())
    except NotImplementedError:  # from torch, as it moves a weight that the file lacks and that has no data
        complete = False
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = str(error).partition(". ")[0]
        raise SettingsError(
            f"{path}: does not fit {folder / name} ({reason}); give the folder of its architecture as config."
        ) from error
    if not complete:
        raise SettingsError(
            f"{path}: has missing keys for {folder / name}; download it again, or give its own architecture as config."
        )
    return model
