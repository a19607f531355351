"""The layouts of low-rank adapters that exist, each read into one form.

| written by                | a key                                                                            |
|---------------------------|----------------------------------------------------------------------------------|
| diffusers from 0.21       | ``unet.down_blocks….to_q.lora_A.weight``                                         |
| peft (see `peft_layout`)  | ``base_model.model.down_blocks….to_q.lora_A.weight``                             |
| diffusers 0.17 to 0.21    | ``unet.down_blocks….attn1.processor.to_q_lora.down.weight``                      |
| diffusers 0.14 to 0.16    | ``down_blocks….attn1.processor.to_q_lora.down.weight``                           |
| its scripts, text encoder | ``text_encoder.text_model….q_proj.lora_linear_layer.down.weight``                |
| kohya's scripts, LyCORIS  | ``lora_unet_down_blocks_…_to_q.lora_down.weight``, ``lora_te_…``, ``lora_te1_…`` |
| the same, original names  | ``lora_unet_input_blocks_1_1_…_to_q.lora_down.weight``                           |

Adapters are shared between strangers: an unknown key is an error, and an expression in a header is read only if it
cannot take long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

from torch import Tensor, nn

from sdmodule.components.checkpoint import Components
from sdmodule.components.lora_layers import LORA, MAGNITUDES, Adapter, find_method, split_key
from sdmodule.components.original_names import unet_layer
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import FAMILIES

METADATA = "lora_adapter_metadata"
"""Header entry in which diffusers keeps the settings of peft."""

BASE_MODEL_ENTRIES = ("ss_base_model_version", "modelspec.architecture")
"""Header entries in which kohya's scripts say which model an adapter is for."""

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")

KOHYA_NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", MAGNITUDES: "dora_scale"}
PEFT_NAMES = {kohya: peft for peft, kohya in KOHYA_NAMES.items()}

_BARE_UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\.")
_OLD_FACTOR = re.compile(r"(?:\.processor\.(\w+)_lora|\.lora_linear_layer|\.lora)\.(down|up)\.weight$")
"""The factors in diffusers before it used peft: the layer's name may stand in the processor's."""

_TEXT_FACTOR = re.compile(r"attn2[._](processor\.)?to_[kv](_lora)?\.(lora_A|lora_down|lora\.down|down)\.weight$")
"""The factor that takes the text embeddings, in any layout."""

_EXPRESSION = re.compile(r"[\w.\\^$|()\[\]*+?-]{1,200}")
"""What an expression of a header may consist of."""

_NESTED = re.compile(r"\([^()]*[*+?|][^()]*\)[*+{]")
"""A repetition of a repetition or of alternatives, which may take exponentially long."""


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether a file's keys are those of a low-rank adapter, in any layout."""
    known = (*KOHYA_PREFIXES, "unet.", "text_encoder.", "text_encoder_2.", "base_model.")
    return any(key.startswith(known) or _BARE_UNET.match(key) for key in keys)


def to_adapter(tensors: dict[str, Tensor], header: dict[str, str], path: str | Path, parts: Components) -> Adapter:
    """Parse an adapter file of any layout.

    Args:
        tensors: tensors of the file.
        header: header of the file.
        path: the file, for messages.
        parts: the model that it is for; its layers' names resolve kohya's, in which dots are underscores.

    Raises:
        SettingsError: if the file holds an unknown key or a layer that the model does not have.
    """
    adapter = Adapter(LORA, {}, {}, str(path))
    _check_architecture(tensors, header, adapter, parts)
    if any(key.startswith(KOHYA_PREFIXES) for key in tensors):
        _read_kohya(tensors, adapter, parts)
    else:
        _read_diffusers(tensors, header, adapter, parts)
    adapter.method = find_method(adapter)
    for part, weights in adapter.weights.items():
        adapter.weights[part] = {key: value.float() for key, value in weights.items()}
    return adapter


def _check_architecture(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], adapter: Adapter, parts: Components
) -> None:
    """Check that a file which is for a known family by the width of its text, or its header, is for that of the model.

    Raises:
        SettingsError: if it is for another one; it names both.
    """
    known = {width: title for family in FAMILIES for width, title in family.text_widths.items()}
    own = parts.unet.config.cross_attention_dim
    factors = (factor for key, factor in tensors.items() if _TEXT_FACTOR.search(key) and factor.ndim > 1)
    found = next((factor.shape[1] for factor in factors), None)
    if found is None:
        _check_header(header, adapter, parts)
    elif found in known and found != own:
        raise SettingsError(
            f"adapters={adapter.source}: is for {known[found]}, whose text embeddings are {found} wide, and those of "
            f"pretrained={parts.source} are {own} wide ({known.get(own, 'another architecture')}); give an adapter "
            "that was trained on a model of this architecture."
        )


def _check_header(header: Mapping[str, str], adapter: Adapter, parts: Components) -> None:
    """Check what a file says of the model that it is for; one of a first text encoder alone fits several families."""
    said = " ".join(header[entry] for entry in BASE_MODEL_ENTRIES if entry in header)
    families = [family for family in FAMILIES if family.adapter_headers.search(said)]
    if families and parts.family not in families:
        raise SettingsError(
            f"adapters={adapter.source}: is for {families[0].title}, as its header says ({said}), and "
            f"pretrained={parts.source} is of {parts.family.title}; give an adapter that was trained on one of these."
        )


def _unknown_key(adapter: Adapter, key: str) -> SettingsError:
    return SettingsError(
        f"adapters={adapter.source}: unknown key {key}; give an adapter in the layout of diffusers, of kohya's "
        "scripts, or of peft with its adapter_config.json."
    )


# ---------------------------------------------------------------------------------------------- diffusers


def _read_diffusers(tensors: dict[str, Tensor], header: dict[str, str], adapter: Adapter, parts: Components) -> None:
    for key, value in tensors.items():
        part, _, rest = f"unet.{key}".partition(".") if _BARE_UNET.match(key) else key.partition(".")
        rest = _modern_name(rest.removeprefix("text_model.") if part == "text_encoder" else rest)
        if part not in parts.family.adapter_prefixes or not split_key(rest)[1]:
            raise _unknown_key(adapter, key)
        if rest.endswith(MAGNITUDES):
            value = value.flatten() if value.ndim < 3 else value.reshape(1, -1, *[1] * (value.ndim - 2))
        adapter.weights.setdefault(part, {})[rest] = value
    for part in adapter.weights:
        adapter.alphas[part] = _alphas(header, part, adapter)


def _modern_name(key: str) -> str:
    """The key of a factor as peft names it."""
    found = _OLD_FACTOR.search(key)
    if found is None:
        return key.removesuffix(".weight") if key.endswith(f"{MAGNITUDES}.weight") else key
    layer = key[: found.start()]
    if found[1]:
        layer += f".{found[1]}" + (".0" if found[1] == "to_out" else "")
    return f"{layer}.lora_{'A' if found[2] == 'down' else 'B'}.weight"


def _alphas(header: dict[str, str], part: str, adapter: Adapter) -> dict[str, float]:
    """Alpha of each layer, from the header of a diffusers file; empty without one, which means a factor of 1."""
    if METADATA not in header:
        return {}
    try:
        settings = json.loads(header[METADATA])
        common = float(settings[f"{part}.lora_alpha"])
        patterns = {name: float(alpha) for name, alpha in (settings.get(f"{part}.alpha_pattern") or {}).items()}
        stabilized = bool(settings.get(f"{part}.use_rslora"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(
            f"adapters={adapter.source}: the header cannot be read ({error}); export the file again."
        ) from error
    expressions = [(compiled(name, adapter.source), alpha) for name, alpha in patterns.items()]
    alphas = {}
    for layer, factors in adapter.layers(part).items():
        alpha = next((alpha for expression, alpha in expressions if expression.match(layer)), common)
        rank = adapter.rank(factors)
        # rank-stabilized (Kalajdzievski 2023): alpha / sqrt(rank), as an alpha that is divided by the rank
        alphas[layer] = alpha * rank**0.5 if stabilized and rank else alpha
    return alphas


def compiled(name: str, source: str) -> re.Pattern[str]:
    """The expression by which peft matches the layers of a pattern.

    Raises:
        SettingsError: for one that might take long, or is none.
    """
    try:
        if not _EXPRESSION.fullmatch(name) or _NESTED.search(name) or len(re.findall(r"(?<!\\)[*+]", name)) > 4:
            raise re.error("too complex")
        return re.compile(rf"(.*\.)?({name})$")
    except re.error as error:
        raise SettingsError(
            f"adapters={source}: alpha_pattern {name!r} in the header is not read ({error}); export the file "
            "with the names of layers."
        ) from error


# ---------------------------------------------------------------------------------------------- kohya


def _read_kohya(tensors: dict[str, Tensor], adapter: Adapter, parts: Components) -> None:
    layers = _kohya_layers(parts)
    scales = {}
    for key, value in tensors.items():
        name, _, factor = key.partition(".")
        if name not in layers:
            raise _unknown_layer(adapter, name, parts)
        part, layer = layers[name]
        weights = adapter.weights.setdefault(part, {})
        if factor in ("alpha", "scale"):
            if value.numel() != 1:
                raise SettingsError(f"adapters={adapter.source}: {key} must be a single number; export the file again.")
            if factor == "alpha":
                adapter.alphas.setdefault(part, {})[layer] = float(value)
            else:
                scales[part, layer] = float(value)
            continue
        renamed = f"{layer}.{PEFT_NAMES.get(factor, factor)}"
        if not split_key(renamed)[1]:
            raise _unknown_key(adapter, key)
        weights[renamed] = _magnitudes(value) if factor == "dora_scale" else value
    for (part, layer), scale in scales.items():
        _set_scale(adapter, part, layer, scale)


def _set_scale(adapter: Adapter, part: str, layer: str, scale: float) -> None:
    """Scale a layer's update by a number of its own, which takes the place of ``alpha / rank`` as in AUTOMATIC1111."""
    factors = adapter.layers(part).get(layer, {})
    if rank := adapter.rank(factors):
        adapter.alphas.setdefault(part, {})[layer] = scale * rank
        return
    for name in factors.keys() & {"diff", "diff_b", "lokr_w1"}:
        adapter.weights[part][f"{layer}.{name}"] = factors[name] * scale


def _unknown_layer(adapter: Adapter, name: str, parts: Components) -> SettingsError:
    """The error for a layer that a model does not have, with the family that has such, if it is another."""
    own = {prefix for prefixes in parts.family.adapter_prefixes.values() for prefix in prefixes}
    others = [
        family.title
        for family in FAMILIES
        for prefixes in family.adapter_prefixes.values()
        if any(name.startswith(f"{prefix}_") and prefix not in own for prefix in prefixes)
    ]
    is_for = f"is for {others[0]}, and " if others else ""
    return SettingsError(
        f"adapters={adapter.source}: {is_for}this model has no layer {name}; give an adapter that was trained on a "
        "model of this architecture."
    )


def _magnitudes(scale: Tensor) -> Tensor:
    """DoRA's magnitudes, by outputs as peft has them, ``[out]`` or ``[1, out, 1, 1]``; those by inputs as they are.

    LyCORIS stores ``[out, 1, …]`` by outputs and ``[1, in, …]`` by inputs, of which the latter is marked by a second
    dimension of more than one element.
    """
    if scale.ndim < 2 or scale.shape[1] == 1:
        return scale.flatten() if scale.ndim < 3 else scale.reshape(1, -1, *[1] * (scale.ndim - 2))
    return scale.reshape(1, -1) if scale.ndim == 2 else scale.unsqueeze(0)


def _kohya_layers(parts: Components) -> dict[str, tuple[str, str]]:
    """The layers that can be adapted, as part and name, by each name that kohya's layout may give them."""
    found = {}
    for part, prefixes in parts.family.adapter_prefixes.items():
        model = getattr(parts, part)
        for layer, module in model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)) and not hasattr(module, "base_layer"):
                continue
            short = layer.removeprefix("text_model.")
            names = [layer, unet_layer(layer, model)] if part == "unet" else [f"text_model.{short}"]
            for prefix, name in product(prefixes, filter(None, names)):
                found[f"{prefix}_{name.replace('.', '_')}"] = part, layer
    return found
