"""Read Stable Diffusion 1.x and 2.x from one file in the original layout, with no network.

The library does the conversion of names; this module adds the configurations, which ship with the package, the choice
among them, and errors that say what a file holds when it is something else.
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

from sdmodule.errors import SettingsError, choices

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

FAMILIES = {(4, 768): "sd1", (9, 768): "sd1_inpaint", (4, 1024): "sd2", (9, 1024): "sd2_inpaint"}

# Parts of a name that only another kind of file has; the first that matches is what the error reports.
FOREIGN = {
    "lora": "a LoRA",
    "hada_w": "a LyCORIS adapter",
    "unet.down_blocks.": "a checkpoint of a training, whose export/ is what to sample with",
    "control_model.": "a ControlNet",
    "conditioner.embedders.": "a Stable Diffusion XL checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "down_blocks.": "one component in the diffusers layout, which is read from its folder",
}

# diffusers 0.42 warns at every cast that an empty list of modules should stay in float32
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "kept in float32: []" not in record.getMessage()
)


class _Bookkeeping:
    """Stands for a class that old `.ckpt` files name, as a key of their callbacks, and never call."""


HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Bookkeeping, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
]


def load_single_file(
    path: Path,
    dtype: torch.dtype | None = None,
    *,
    config: Path | None = None,
    prediction_type: str | None = None,
) -> dict[str, Any]:
    """Load the components of a Stable Diffusion checkpoint in the original layout.

    The raw weights are read; EMA weights kept beside them under `model_ema.` are left out.

    Args:
        path: A `.safetensors` or `.ckpt` file. A `.ckpt` is read as weights only, so nothing in it is executed.
        dtype: The type of all weights, float32 unless given.
        config: A local diffusers folder of the file's architecture. Unless given, it is recognised from the shapes.
        prediction_type: What the UNet predicts. Unless given, 2.x is measured (see `predicts_noise`) and 1.x and
            inpainting models predict the noise.

    Returns:
        `unet`, `vae` and `text_encoder` in evaluation mode, `tokenizer`, and `scheduler` (DDIM).

    Raises:
        SettingsError: The file or an argument cannot be used.
    """
    dtype = dtype or torch.float32
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise SettingsError(f"prediction_type={prediction_type!r} is unknown; use one of {choices(PREDICTION_TYPES)}.")
    weights = _read_weights(Path(path))
    _check_parts(path, weights)
    folder = _checked_folder(config) if config else _recognise(path, weights, prediction_type)

    scheduler = DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
    if prediction_type:
        scheduler["prediction_type"] = prediction_type
    return {
        **{name: _load_model(path, name, weights, folder, dtype) for name in PREFIXES},
        "tokenizer": _load_tokenizer(folder, weights),
        "scheduler": DDIMScheduler.from_config(scheduler),
    }


def load_clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Build the tokenizer of CLIP from the merges that ship with the package.

    Args:
        pad_token: Stable Diffusion 1.x pads with `<|endoftext|>`, 2.x with `!` (id 0).

    Returns:
        A tokenizer of 49,408 entries for 77 tokens.
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

    Shapes do not tell the two apart. The last timestep does: its latents are nearly pure noise, so a network that
    predicts the noise returns its input, whereas v is then the negated image (Salimans & Ho 2022, appendix D).

    Args:
        unet: Called as `unet(latents, timestep, encoder_hidden_states)`.
        in_channels: Channels of the latents.
        cross_attention_dim: Width of the text embedding.

    Returns:
        Whether output and input correlate by more than one half.
    """
    noise = torch.randn(1, in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    predicted = unet(noise, 999, encoder_hidden_states=torch.zeros(1, 77, cross_attention_dim)).sample
    return torch.corrcoef(torch.stack([noise.flatten(), predicted.flatten()]))[0, 1].item() > 0.5


def _read_weights(path: Path) -> Weights:
    """Map the tensors of a file into memory; their pages are read when they are used."""
    if not path.is_file():
        raise SettingsError(f"{path} is not a file; give the path of a .safetensors or .ckpt checkpoint.")
    match path.suffix.lower():
        case ".safetensors":
            try:
                weights = load_file(path)
            except (SafetensorError, OSError) as error:
                raise SettingsError(f"{path} is damaged or incomplete ({error}); fetch or export it again.") from error
        case ".ckpt":
            weights = _read_pickle(path)
        case suffix:
            raise SettingsError(f"{path} ends in {suffix!r}; a single-file checkpoint is a .safetensors or .ckpt file.")
    # transformers 5 writes the text encoder without the prefix that the original layout has
    return {
        key.replace(CLIP, f"{CLIP}text_model.") if key.startswith(CLIP) and "text_model." not in key else key: tensor
        for key, tensor in weights.items()
    }


def _read_pickle(path: Path) -> Weights:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle raises whatever its bytes spell
        raise SettingsError(
            f"{path} cannot be read as weights alone: it is damaged, or it asks to run code, which is refused; "
            "use a .safetensors version of it."
        ) from error
    while isinstance(saved, dict) and "state_dict" in saved:
        saved = saved["state_dict"]
    if not isinstance(saved, dict):
        raise SettingsError(f"{path} holds a {type(saved).__name__}, not named weights; give a full checkpoint.")
    return {key: value for key, value in saved.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _check_parts(path: Path, weights: Iterable[str]) -> None:
    """Raise unless a UNet, an autoencoder and a text encoder are there."""
    missing = [part for part, prefix in PREFIXES.items() if not any(key.startswith(prefix) for key in weights)]
    if not missing and CONV_IN in weights:
        return
    found = next((kind for mark, kind in FOREIGN.items() if any(mark in key for key in weights)), None)
    if not found and len(missing) < len(PREFIXES):
        found = f"a checkpoint without {' and '.join(missing) or CONV_IN}"
    elif not found:
        found = f"something unknown ({', '.join(sorted(weights)[:3]) or 'no weights'})"
    raise SettingsError(
        f"{path} is {found}; give a full Stable Diffusion 1.x or 2.x checkpoint in the original layout."
    )


def _recognise(path: Path, weights: Weights, prediction_type: str | None) -> Path:
    """Choose the shipped configuration from shapes and, for 2.x, from what the UNet predicts."""
    channels = weights[CONV_IN].shape[1]
    width = next((tensor.shape[-1] for key, tensor in weights.items() if key.endswith(TEXT_KEYS)), 0)
    family = FAMILIES.get((channels, width))
    if not family:
        raise SettingsError(
            f"{path} has a UNet of {channels} input channels and text width {width}; shipped are 4 or 9 channels with "
            "768 (1.x) or 1024 (2.x), so give the diffusers folder of its architecture as config."
        )
    if family == "sd2" and prediction_type is None:
        unet = _load_model(path, "unet", weights, CONFIGS / family, torch.float32)
        prediction_type = "epsilon" if predicts_noise(unet, channels, width) else "v_prediction"
    return CONFIGS / ("sd2_v" if (family, prediction_type) == ("sd2", "v_prediction") else family)


def _checked_folder(config: Path) -> Path:
    missing = [name for name in (*PREFIXES, "scheduler") if not (Path(config) / name).is_dir()]
    if missing:
        raise SettingsError(
            f"config={config} has no {choices(missing)}; give a local diffusers folder of the file's architecture."
        )
    return Path(config)


def _load_tokenizer(folder: Path, weights: Iterable[str]) -> CLIPTokenizer:
    if (folder / "tokenizer").is_dir():
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return load_clip_tokenizer("!" if any(key.startswith(OPEN_CLIP) for key in weights) else "<|endoftext|>")


def _load_model(path: Path, name: str, weights: Weights, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Read one network, and raise unless every weight of its architecture was in the file, in its shape."""
    source = {"config": str(folder), "subfolder": name, "torch_dtype": dtype, "local_files_only": True}
    own = {key: tensor for key, tensor in weights.items() if key.startswith(PREFIXES[name])}
    try:
        model = READERS[name](own, **source)
        complete = not any(weight.is_meta for weight in model.parameters())
    except NotImplementedError:  # moving a weight that was never filled
        complete = False
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = str(error).partition(". ")[0]
        raise SettingsError(f"{path} does not fit {folder / name} ({reason}); give its own architecture.") from error
    if not complete:
        raise SettingsError(
            f"{path} lacks weights that {folder / name} has; the file is incomplete, or give its own architecture."
        )
    return model
