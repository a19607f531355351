"""Adapter files in two layouts: that of diffusers, and that of kohya's scripts, which AUTOMATIC1111's web UI reads.

Adapters are shared between strangers, so only safetensors files are read, and an unknown key is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdmodule.components.checkpoint import Components
from sdmodule.components.lora_layers import DORA, LOHA, LOKR, LORA, METHODS, Adapter, split_key
from sdmodule.errors import SettingsError, choices

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the settings of peft."""

MAGNITUDES = "lora_magnitude_vector"
"""peft's name of the magnitudes that DoRA learns."""

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
KOHYA_PREFIXES = tuple(f"{prefix}_" for prefix in PREFIXES.values())
KOHYA_NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
KOHYA_NAMES[MAGNITUDES] = "dora_scale"
PEFT_NAMES = {kohya: peft for peft, kohya in KOHYA_NAMES.items()}
OLD_NAMES = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}
"""Names of the factors in diffusers before it used peft."""


def write_diffusers(adapter: Adapter, folder: Path, dtype: str) -> None:
    """Write the file that ``StableDiffusionPipeline.load_lora_weights`` looks for, with weights of ``dtype``."""
    weights, settings = {}, {}
    for part in adapter.weights:
        prefix = "text_model." if part == "text_encoder" else ""  # transformers 5 leaves it out; other tools expect it
        for key, value in adapter.weights[part].items():
            # diffusers hands a text encoder's keys to transformers, which only knows DoRA's magnitudes by this name
            suffix = ".weight" if prefix and key.endswith(MAGNITUDES) else ""
            weights[f"{part}.{prefix}{key}{suffix}"] = value
        config = adapter.config(part).to_dict()
        for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora"):
            value = config[name]
            settings[f"{part}.{name}"] = sorted(value) if isinstance(value, (set, list)) else value
    _save(weights, folder / DIFFUSERS_FILE, dtype, {METADATA: json.dumps(settings)})


def write_kohya(adapter: Adapter, folder: Path, dtype: str) -> None:
    """Write the layout of kohya's scripts and of LyCORIS, with weights of ``dtype``."""
    weights = {}
    for part in adapter.weights:
        prefix = f"{PREFIXES[part]}_text_model" if part == "text_encoder" else PREFIXES[part]
        for layer, factors in adapter.layers(part).items():
            flat = f"{prefix}_{layer.replace('.', '_')}"
            for factor, value in factors.items():
                if factor == MAGNITUDES:
                    value = value.reshape(len(value.flatten()), *[1] * (factors["lora_A.weight"].ndim - 1))
                weights[f"{flat}.{KOHYA_NAMES.get(factor, factor)}"] = value
            if (alpha := adapter.alphas.get(part, {}).get(layer)) is not None:
                weights[f"{flat}.alpha"] = torch.tensor(alpha)
    _save(weights, folder / KOHYA_FILE, dtype, {})


def _save(weights: dict[str, Tensor], file: Path, dtype: str, metadata: dict[str, str]) -> None:
    cast = {key: value.to(getattr(torch, dtype)).contiguous() for key, value in weights.items()}
    save_file(cast, file, metadata={"format": "pt", **metadata})


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


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether a file's keys are those of a low-rank adapter, in either layout."""
    return any(key.startswith((*KOHYA_PREFIXES, "unet.", "text_encoder.")) for key in keys)


def to_adapter(tensors: dict[str, Tensor], header: dict[str, str], path: str | Path, parts: Components) -> Adapter:
    """Parse an adapter file of either layout.

    Args:
        tensors: tensors of the file, from `read_tensors`.
        header: header of the file.
        path: the file, for messages.
        parts: the model that it is for; its layers' names resolve kohya's, in which dots are underscores.

    Raises:
        SettingsError: if the file holds an unknown key or a layer that the model does not have.
    """
    adapter = Adapter(LORA, {}, {}, str(path))
    if any(key.startswith(KOHYA_PREFIXES) for key in tensors):
        _read_kohya(tensors, adapter, parts)
    else:
        _read_diffusers(tensors, header, adapter)
    factors = {split_key(key)[1] for weights in adapter.weights.values() for key in weights}
    adapter.method = _method(factors, path)
    for part, weights in adapter.weights.items():
        adapter.weights[part] = {key: value.float() for key, value in weights.items()}
    return adapter


def _method(factors: set[str], path: str | Path) -> str:
    kinds = {factor.partition("_")[0] for factor in factors}
    if kinds == {"lora"}:
        return DORA if MAGNITUDES in factors else LORA
    if kinds == {"hada"}:
        return LOHA
    if kinds == {"lokr"}:
        return LOKR
    raise SettingsError(f"adapters={path}: not an adapter of a single method; give one of {choices(METHODS)}.")


def _unknown_key(adapter: Adapter, key: str) -> SettingsError:
    return SettingsError(
        f"adapters={adapter.source}: unknown key {key}; give an adapter in the layout of diffusers or kohya's scripts."
    )


def _read_diffusers(tensors: dict[str, Tensor], header: dict[str, str], adapter: Adapter) -> None:
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part == "text_encoder":
            rest = rest.removeprefix("text_model.")
        if rest.endswith(f"{MAGNITUDES}.weight"):
            rest = rest.removesuffix(".weight")
        for old, new in OLD_NAMES.items():
            rest = rest.removesuffix(old) + new if rest.endswith(old) else rest
        if part not in PREFIXES or not split_key(rest)[1]:
            raise _unknown_key(adapter, key)
        adapter.weights.setdefault(part, {})[rest] = value
    for part in adapter.weights:
        adapter.alphas[part] = _alphas(header, part, adapter)


def _alphas(header: dict[str, str], part: str, adapter: Adapter) -> dict[str, float]:
    """Alpha of each layer, from the header of a diffusers file; empty without one, which means a factor of 1."""
    if METADATA not in header:
        return {}
    try:
        settings = json.loads(header[METADATA])
        common = float(settings[f"{part}.lora_alpha"])
        # peft reads these names as regular expressions; a stranger's is never run, and those written are plain names
        patterns = {name.replace("\\", ""): float(a) for name, a in settings[f"{part}.alpha_pattern"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(
            f"adapters={adapter.source}: the header cannot be read ({error}); export the file again."
        ) from error
    alphas = {}
    for layer in adapter.layers(part):
        alphas[layer] = next((alpha for name, alpha in patterns.items() if f".{layer}".endswith(f".{name}")), common)
    return alphas


def _read_kohya(tensors: dict[str, Tensor], adapter: Adapter, parts: Components) -> None:
    flat = {f"{PREFIXES[part]}_{name}": (part, layer) for part, name, layer in _flat_names(parts)}
    for key, value in tensors.items():
        name, _, factor = key.partition(".")
        if name not in flat:
            raise SettingsError(
                f"adapters={adapter.source}: this model has no layer {name}; give an adapter that was trained on a "
                "model of this architecture."
            )
        part, layer = flat[name]
        weights = adapter.weights.setdefault(part, {})
        if factor == "alpha":
            if value.numel() != 1:
                raise SettingsError(f"adapters={adapter.source}: {key} must be a single number; export the file again.")
            adapter.alphas.setdefault(part, {})[layer] = float(value)
            continue
        renamed = f"{layer}.{PEFT_NAMES.get(factor, factor)}"
        if not split_key(renamed)[1]:
            raise _unknown_key(adapter, key)
        weights[renamed] = value
    for weights in adapter.weights.values():
        for key in weights:
            layer, factor = split_key(key)
            if factor == MAGNITUDES:
                weights[key] = _magnitudes(weights[key], weights.get(f"{layer}.lora_A.weight"))


def _magnitudes(scale: Tensor, down: Tensor | None) -> Tensor:
    """DoRA's magnitudes in the shape that peft expects: ``[out]``, or ``[1, out, 1, 1]`` for a convolution."""
    return scale.flatten() if down is None or down.ndim == 2 else scale.reshape(1, -1, *[1] * (down.ndim - 2))


def _flat_names(parts: Components) -> Iterable[tuple[str, str, str]]:
    """Layers that can be adapted, each as its part, its kohya name without the part's prefix, and its name."""
    for part in PREFIXES:
        prefix = "text_model_" if part == "text_encoder" else ""
        for layer, module in getattr(parts, part).named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) or hasattr(module, "base_layer"):
                short = layer.removeprefix("text_model.")
                yield part, f"{prefix}{short.replace('.', '_')}", layer
