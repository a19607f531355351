"""Load Stable Diffusion 1.x and 2.x from a single file in the original layout, without a network.

diffusers converts the keys. This module adds the configurations, which ship with the package, chooses among them, and
says what a file holds if it is not such a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from sdmodule.components.original_layout import OPEN_CLIP, PREFIXES, build_network, with_prefix
from sdmodule.components.weights_file import Weights, read_weights
from sdmodule.errors import SettingsError, check_choice, choices

CONFIGS = Path(__file__).parent / "assets" / "configs"
PREDICTION_TYPES = ("epsilon", "v_prediction")

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_KEYS = "attn2.to_k.weight"

CONFIG_BY_SHAPE = {(4, 768): "sd1", (9, 768): "sd1_inpaint", (4, 1024): "sd2", (9, 1024): "sd2_inpaint"}
"""Folder of the configuration, by the UNet's input channels and the width of the text embeddings."""

FOREIGN = {
    "lora": "a LoRA",
    "hada_w": "a LyCORIS adapter",
    "lokr_w": "a LyCORIS adapter",
    "unet.down_blocks.": "a training checkpoint (sample from the export/ of the run instead)",
    "control_model.": "a ControlNet",
    "conditioner.embedders.": "a Stable Diffusion XL checkpoint",
    "label_emb.": "a checkpoint of Stable Diffusion XL, or of another model whose UNet takes more than text",
    "double_blocks.": "a Flux checkpoint",
    "joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "down_blocks.": "one component in the diffusers layout, which is read from its folder",
}
"""Parts of keys that only other kinds of files have; the error reports the first that matches."""

OTHER_MODELS = ("conditioner.embedders.", "label_emb.", "double_blocks.", "joint_blocks.")
"""Those of whole checkpoints, which are refused even if their shapes happen to fit."""

# at every cast diffusers 0.42 warns about an empty list of modules kept in float32
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "kept in float32: []" not in record.getMessage()
)


def load_single_file(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    config: Path | None = None,
    prediction_type: str | None = None,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Load the components of a Stable Diffusion checkpoint in the original layout.

    The raw weights are loaded; EMA weights beside them, under ``model_ema.``, are ignored.

    Args:
        path: a ``.safetensors`` or ``.ckpt`` file. A ``.ckpt`` is loaded as weights only: nothing in it is executed.
        dtype: type of all weights, by default float32.
        config: local diffusers folder of the file's architecture; by default chosen from the shapes.
        prediction_type: what the UNet predicts; by default measured for 2.x (see `predicts_noise`), and the noise for
            1.x and inpainting models.
        without: networks that come from elsewhere, which the file may then lack.

    Returns:
        ``unet``, ``vae`` and ``text_encoder`` in evaluation mode but for those of ``without``, ``tokenizer``, and
        ``scheduler`` (DDIM).

    Raises:
        SettingsError: if the file or an argument cannot be used.
    """
    dtype = dtype or torch.float32
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    weights = with_prefix("text_encoder", read_weights(Path(path)))
    _check_parts(path, weights, without)
    folder = _check_config(config) if config else _choose_config(path, weights, prediction_type)

    scheduler = DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
    if prediction_type:
        scheduler["prediction_type"] = prediction_type
    return {
        **{name: _load_model(path, name, weights, folder, dtype) for name in PREFIXES if name not in without},
        "tokenizer": _load_tokenizer(folder, weights),
        "scheduler": DDIMScheduler.from_config(scheduler),
    }


def load_single_part(path: Path, name: str, config: Path | None = None) -> Any:
    """Load one part from a file of the original layout that holds this part alone, or a whole checkpoint.

    Args:
        path: a ``.safetensors`` or ``.ckpt`` file.
        name: ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` or ``scheduler``.
        config: local diffusers folder of the file's architecture; by default chosen from the shapes.

    Raises:
        SettingsError: if the file cannot be used, or lacks the part.
    """
    if name not in PREFIXES:
        return load_single_file(path, config=config, without=("unet", "vae", "text_encoder"))[name]
    weights = with_prefix(name, read_weights(path))
    if name == "unet":
        _refuse_other_models(path, weights)
    if not any(key.startswith(PREFIXES[name]) for key in weights):
        raise SettingsError(f"{path}: is {_kind_of(weights)}; give one that holds the part {name}.")
    folder = Path(config) if config else _config_of_part(path, name, weights)
    return _load_model(path, name, weights, folder, torch.float32)


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


def _check_parts(path: Path, weights: Weights, without: Collection[str]) -> None:
    """Check that a file has the keys of a UNet, an autoencoder and a text encoder, but for those of ``without``."""
    _refuse_other_models(path, weights)
    missing = [name for name in _missing_parts(weights) if name not in without]
    if not missing and CONV_IN in weights:
        return
    if adapter := _adapter_kind(weights):
        raise SettingsError(
            f"{path}: is {adapter}, no whole checkpoint; give adapters={path} beside the checkpoint it was trained on."
        )
    raise SettingsError(
        f"{path}: is {_kind_of(weights)}; give a full Stable Diffusion 1.x or 2.x checkpoint in the original layout"
        + (f", or set {' and '.join(f'components.{name}' for name in missing)}." if CONV_IN in weights else ".")
    )


def _refuse_other_models(path: Path, weights: Weights) -> None:
    """Refuse a whole checkpoint of another model."""
    mark = next((mark for mark in OTHER_MODELS if any(mark in key for key in weights)), None)
    if mark is not None and not _adapter_kind(weights):
        raise SettingsError(
            f"{path}: is {FOREIGN[mark]}; give a Stable Diffusion 1.x or 2.x checkpoint in the original layout."
        )


def _adapter_kind(weights: Weights) -> str:
    """What kind of adapter a file holds, if it is one."""
    for mark in ("lora", "hada_w", "lokr_w"):
        if any(mark in key for key in weights):
            return FOREIGN[mark]
    word = next(iter(weights), ".")
    return "a learned word" if len(weights) == 1 and "." not in word and weights[word].ndim <= 2 else ""


def _missing_parts(weights: Iterable[str]) -> list[str]:
    return [part for part, prefix in PREFIXES.items() if not any(key.startswith(prefix) for key in weights)]


def _kind_of(weights: Collection[str]) -> str:
    """What a file holds that is not a whole checkpoint, for messages."""
    found = next((kind for mark, kind in FOREIGN.items() if any(mark in key for key in weights)), None)
    missing = _missing_parts(weights)
    if not found and len(missing) < len(PREFIXES):
        return f"a checkpoint without {' and '.join(missing) or CONV_IN}"
    return found or f"an unknown kind of file ({', '.join(sorted(weights)[:3]) or 'no weights'})"


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
        unet: Any = _load_model(path, "unet", weights, CONFIGS / name, torch.float32)
        prediction_type = "epsilon" if predicts_noise(unet, channels, width) else "v_prediction"
    return CONFIGS / ("sd2_v" if (name, prediction_type) == ("sd2", "v_prediction") else name)


def _config_of_part(path: Path, name: str, weights: Weights) -> Path:
    """The shipped configuration of a part alone; the autoencoders of 1.x and 2.x are the same."""
    if name == "unet" and CONV_IN in weights:
        return _choose_config(path, weights, "epsilon")
    return CONFIGS / ("sd2" if name == "text_encoder" and any(key.startswith(OPEN_CLIP) for key in weights) else "sd1")


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
    """Load one network, and say which folder it was expected to fit if it does not."""
    try:
        return build_network(name, weights, folder, dtype)
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # UnfitWeights, or from diffusers
        reason = str(error).partition(". ")[0]
        raise SettingsError(
            f"{path}: does not fit {folder / name} ({reason}); download it again, or give the diffusers folder of its "
            "architecture."
        ) from error
