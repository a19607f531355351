"""Files of adapters: the layout of diffusers, and that of kohya's scripts, which AUTOMATIC1111's web UI reads.

Adapters come from strangers: they are read as safetensors alone, and each key must be known.
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
from sdmodule.components.lora_layers import DORA, LOHA, LOKR, LORA, Adapter, split_key
from sdmodule.errors import SettingsError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps the settings of peft in a file's header."""

MAGNITUDES = "lora_magnitude_vector"
"""peft's name of the lengths that DoRA learns."""

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
KOHYA_NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
KOHYA_NAMES[MAGNITUDES] = "dora_scale"
PEFT_NAMES = {kohya: own for own, kohya in KOHYA_NAMES.items()}
OLD_NAMES = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}
"""What diffusers called the factors before it had peft."""


def write_diffusers(adapter: Adapter, folder: Path, dtype: str) -> None:
    """Write the file that ``StableDiffusionPipeline.load_lora_weights`` looks for in a folder."""
    weights, settings = {}, {}
    for part in adapter.weights:
        inside = "text_model." if part == "text_encoder" else ""  # transformers 5 leaves it out; others expect it
        for key, value in adapter.weights[part].items():
            # for text encoders diffusers hands the file to transformers, which knows DoRA's lengths by this name alone
            end = ".weight" if inside and key.endswith(MAGNITUDES) else ""
            weights[f"{part}.{inside}{key}{end}"] = value
        config = adapter.config(part).to_dict()
        for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora"):
            value = config[name]
            settings[f"{part}.{name}"] = sorted(value) if isinstance(value, (set, list)) else value
    _save(weights, folder / DIFFUSERS_FILE, dtype, {METADATA: json.dumps(settings)})


def write_kohya(adapter: Adapter, folder: Path, dtype: str) -> None:
    """Write the layout of kohya's scripts and of LyCORIS."""
    weights = {}
    for part in adapter.weights:
        inside = "text_model_" if part == "text_encoder" else ""
        for layer, factors in adapter.layers(part).items():
            flat = f"{PREFIXES[part]}_{inside}{layer.replace('.', '_')}"
            for factor, value in factors.items():
                if factor == MAGNITUDES:
                    value = value.reshape(len(value.flatten()), *[1] * (factors["lora_A.weight"].ndim - 1))
                weights[f"{flat}.{KOHYA_NAMES.get(factor, factor)}"] = value
            if (alpha := adapter.alphas.get(part, {}).get(layer)) is not None:
                weights[f"{flat}.alpha"] = torch.tensor(alpha)
    _save(weights, folder / KOHYA_FILE, dtype, {})


def _save(weights: dict[str, Tensor], file: Path, dtype: str, metadata: dict[str, str]) -> None:
    typed = {key: value.to(getattr(torch, dtype)).contiguous() for key, value in weights.items()}
    save_file(typed, file, metadata={"format": "pt", **metadata})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and header of a ``.safetensors`` file.

    Raises:
        SettingsError: if it is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(f"adapters: {path} was not found; give a .safetensors file, or the export of a training.")
    if file.suffix != ".safetensors":
        raise SettingsError(
            f"adapters: {path} is no .safetensors file, and any other may run code when it is read; convert it first."
        )
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise SettingsError(f"adapters: {path} cannot be read ({error}); give a whole .safetensors file.") from error


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether the keys of a file are those of an adapter of low rank."""
    return any(
        key.startswith((*(f"{prefix}_" for prefix in PREFIXES.values()), "unet.", "text_encoder.")) for key in keys
    )


def to_adapter(tensors: dict[str, Tensor], header: dict[str, str], path: str | Path, parts: Components) -> Adapter:
    """The adapter that a file of either layout holds.

    Args:
        tensors: of the file, as `read_tensors` gives them.
        header: of the file.
        path: the file, for messages.
        parts: the model that it is for, whose layers' names tell what kohya's names mean.

    Raises:
        SettingsError: if the file holds anything that is not known.
    """
    kohya = any(key.startswith(tuple(f"{prefix}_" for prefix in PREFIXES.values())) for key in tensors)
    adapter = Adapter(LORA, {}, {}, str(path))
    if kohya:
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
        return DORA if "lora_magnitude_vector" in factors else LORA
    if kinds == {"hada"}:
        return LOHA
    if kinds == {"lokr"}:
        return LOKR
    raise SettingsError(f"adapters: {path} is no adapter of one known kind (lora, dora, loha or lokr).")


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
            raise SettingsError(f"adapters: {adapter.source} holds {key}, which is not known.")
        adapter.weights.setdefault(part, {})[rest] = value
    for part in adapter.weights:
        adapter.alphas[part] = _alphas(header, part, adapter)


def _alphas(header: dict[str, str], part: str, adapter: Adapter) -> dict[str, float]:
    """The alphas that a file of diffusers names in its header; without it each layer counts once."""
    if METADATA not in header:
        return {}
    try:
        settings = json.loads(header[METADATA])
        common = float(settings[f"{part}.lora_alpha"])
        # peft takes these names for patterns; a stranger's is not run, and those that are written are plain names
        own = {name.replace("\\", ""): float(a) for name, a in settings[f"{part}.alpha_pattern"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(f"adapters: {adapter.source} has a header that cannot be read ({error}).") from error
    alphas = {}
    for layer in adapter.layers(part):
        alphas[layer] = next((alpha for name, alpha in own.items() if f".{layer}".endswith(f".{name}")), common)
    return alphas


def _read_kohya(tensors: dict[str, Tensor], adapter: Adapter, parts: Components) -> None:
    flat = {f"{PREFIXES[part]}_{name}": (part, layer) for part, name, layer in _flat_names(parts)}
    for key, value in tensors.items():
        name, _, factor = key.partition(".")
        if name not in flat:
            raise SettingsError(
                f"adapters: {adapter.source} adapts {name}, a layer that this model does not have; give one that was "
                "trained on a model of this architecture."
            )
        part, layer = flat[name]
        weights = adapter.weights.setdefault(part, {})
        if factor == "alpha":
            if value.numel() != 1:
                raise SettingsError(f"adapters: {adapter.source} has no single number in {key}.")
            adapter.alphas.setdefault(part, {})[layer] = float(value)
            continue
        own = f"{layer}.{PEFT_NAMES.get(factor, factor)}"
        if not split_key(own)[1]:
            raise SettingsError(f"adapters: {adapter.source} holds {key}, which is not known.")
        weights[own] = value
    for weights in adapter.weights.values():
        for key in weights:
            layer, factor = split_key(key)
            if factor == MAGNITUDES:
                weights[key] = _magnitudes(weights[key], weights.get(f"{layer}.lora_A.weight"))


def _magnitudes(scale: Tensor, down: Tensor | None) -> Tensor:
    """Lengths of a layer's outputs as peft shapes them: ``[out]``, or ``[1, out, 1, 1]`` of a convolution."""
    return scale.flatten() if down is None or down.ndim == 2 else scale.reshape(1, -1, *[1] * (down.ndim - 2))


def _flat_names(parts: Components) -> Iterable[tuple[str, str, str]]:
    """Each layer that can be adapted: its part, its name without dots, its name."""
    for part in PREFIXES:
        inside = "text_model_" if part == "text_encoder" else ""
        for layer, module in getattr(parts, part).named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) or hasattr(module, "base_layer"):
                short = layer.removeprefix("text_model.")
                yield part, f"{inside}{short.replace('.', '_')}", layer
