"""Low-rank adapters of a model (LoRA, DoRA, LoHa, LoKr): extract them from peft's layers, and attach them as such."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError

LORA, DORA, LOHA, LOKR = METHODS = ("lora", "dora", "loha", "lokr")
MIXED = "mixed"
"""Method of an adapter whose layers have several, or whole weights."""

TRAINED = "default"
"""peft's name of the adapter that is trained."""

MAGNITUDES = "lora_magnitude_vector"
"""peft's name of the magnitudes that DoRA learns."""

BIAS = "lora_B.bias"
"""What an adapter with ``lora_bias`` adds to a layer's bias."""

RANK_FACTORS = ("lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Factors with as many rows as the rank."""

_PEFT_FACTOR = r"lora_[AB]\.weight|lora_magnitude_vector|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?"
_FACTOR = re.compile(rf"\.({_PEFT_FACTOR}|lora_B\.bias|lora_mid\.weight|hada_t[12]|lokr_t2|diff(?:_b)?)$")

FactorNames = Iterable[str]


@dataclass
class Adapter:
    """A low-rank adapter of the UNet, the text encoders, or all of them.

    Attributes:
        method: one of `METHODS`, or `MIXED`.
        weights: for ``unet``, ``text_encoder`` and so on, factors by key, such as ``mid_block….to_q.lora_A.weight``.
        alphas: for each part, alpha by layer; the update is scaled by ``alpha / rank``, or by 1 for a layer without.
        source: where it came from, for messages.
    """

    method: str
    weights: dict[str, dict[str, Tensor]]
    alphas: dict[str, dict[str, float]] = field(default_factory=dict)
    source: str = ""

    def layers(self, part: str) -> dict[str, dict[str, Tensor]]:
        """Factors of a part, by layer and then by the factor's name."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, value in self.weights[part].items():
            layer, factor = split_key(key)
            layers.setdefault(layer, {})[factor] = value
        return layers

    def rank(self, factors: dict[str, Tensor]) -> int | None:
        """Rank of a layer's factors; None for whole weights and a Kronecker product of two full matrices."""
        for name in RANK_FACTORS:
            if name in factors:
                return factors[name].shape[0]
        return None

    def config(self, part: str) -> PeftConfig:
        """Configuration of peft for the layers of a part."""
        ranks, alphas = {}, {}
        for layer, factors in self.layers(part).items():
            rank = self.rank(factors)
            # a rank as large as the layer makes peft keep both matrices of a Kronecker product full
            ranks[layer] = rank or max(max(factor.shape) for factor in factors.values())
            # that product has no scale, whatever alpha says: LyCORIS sets it to 1
            alphas[layer] = self.alphas.get(part, {}).get(layer, rank) if rank else ranks[layer]
        rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
        settings: dict[str, Any] = {
            "r": rank,
            "target_modules": list(ranks),
            "rank_pattern": {re.escape(layer): value for layer, value in ranks.items() if value != rank},
            "alpha_pattern": {re.escape(layer): value for layer, value in alphas.items() if value != alpha},
        }
        if self.method in (LORA, DORA):
            return LoraConfig(lora_alpha=alpha, use_dora=self.method == DORA, **settings)
        return (LoHaConfig if self.method == LOHA else LoKrConfig)(alpha=alpha, **settings)


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def split_key(key: str) -> tuple[str, str]:
    """Layer and factor name of a key; the factor name is empty if the key is not a factor's."""
    found = _FACTOR.search(key)
    return (key[: found.start()], found[1]) if found else (key, "")


def find_method(adapter: Adapter) -> str:
    """The method of an adapter, by the names of its factors."""
    factors = {split_key(key)[1] for weights in adapter.weights.values() for key in weights}
    kinds = {factor.partition("_")[0] for factor in factors - {MAGNITUDES}}
    if len(kinds) != 1 or kinds == {"diff"}:
        return MIXED
    [kind] = kinds
    if kind != "lora":
        return MIXED if MAGNITUDES in factors else {"hada": LOHA, "lokr": LOKR}[kind]
    return DORA if MAGNITUDES in factors else LORA


def is_attachable(adapter: Adapter, parts: Components) -> bool:
    """Whether peft's layers compute what the adapter says."""
    if adapter.method not in METHODS:
        return False
    for part in adapter.weights:
        model = getattr(parts, part)
        for layer, factors in adapter.layers(part).items():
            if not all(re.fullmatch(_PEFT_FACTOR, factor) for factor in factors):
                return False
            if MAGNITUDES in factors and factors[MAGNITUDES].ndim not in (1, 4):  # lengths of inputs
                return False
            if adapter.method == LOKR and not _has_pefts_sides(factors, dict(model.named_modules()).get(layer)):
                return False
    return True


def _has_pefts_sides(factors: dict[str, Tensor], layer: Any) -> bool:
    """Whether the matrices of a Kronecker product have the sides that peft gives them, the nearest to a square."""
    first, rank = factors.get("lokr_w1"), factors.get("lokr_w2_b")
    if layer is None or first is None:
        return False
    (out_first, out_second), (in_first, in_second) = (factorization(side, -1) for side in layer.weight.shape[:2])
    small = rank is None or rank.shape[0] < max(out_second, in_second) / 2
    return tuple(first.shape) == (out_first, in_first) and small


def extract_adapter(parts: Components, method: str, name: str = TRAINED) -> Adapter:
    """Copy the adapter called ``name`` from a model to the CPU."""
    weights, alphas = {}, {}
    for part in parts.family.adapter_prefixes:
        model = getattr(parts, part)
        layers = dict(_adapted(model, name))
        if not layers:
            continue
        state = get_peft_model_state_dict(model, adapter_name=name)
        weights[part] = {key: value.detach().cpu().clone() for key, value in state.items()}
        alphas[part] = {layer: float(_alpha(module, name)) for layer, module in layers.items()}
    adapter = Adapter(method, weights, alphas, parts.source)
    _fold_scale_into_full_products(adapter, parts, name)
    return adapter


def _alpha(layer: Any, name: str) -> float:
    return layer.lora_alpha[name] if hasattr(layer, "lora_alpha") else layer.alpha[name]


def _fold_scale_into_full_products(adapter: Adapter, parts: Components, name: str) -> None:
    """Scale the first matrix of each Kronecker product without a rank: other tools ignore alpha there."""
    for part in adapter.weights:
        modules = dict(_adapted(getattr(parts, part), name))
        for layer, factors in adapter.layers(part).items():
            if adapter.rank(factors) is None:
                factors["lokr_w1"].mul_(modules[layer].scaling[name])
                del adapter.alphas[part][layer]


def _adapted(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter called ``name``, and their paths in the model."""
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.r:  # type: ignore[attr-defined]
            yield path, layer


def attach_adapter(parts: Components, adapter: Adapter, scale: float, name: str) -> None:
    """Add an adapter to a model as frozen layers beside its weights, in place.

    Args:
        parts: the model.
        adapter: what to add.
        scale: factor of its update.
        name: peft's name for it.

    Raises:
        SettingsError: if the adapter's layers, factors or shapes do not fit this model.
    """
    for part in adapter.weights:
        model = getattr(parts, part)
        check_layers(adapter, part, model)
        training = model.training
        try:
            inject_adapter_in_model(adapter.config(part), model, name)
        except ValueError as error:
            raise SettingsError(
                f"adapters={adapter.source}: does not fit the {part} ({' '.join(str(error).split())}); give another."
            ) from error
        expected = get_peft_model_state_dict(model, adapter_name=name)
        _check_factors(adapter, part, expected)
        set_peft_model_state_dict(model, dict(adapter.weights[part]), adapter_name=name)
        for _, layer in _adapted(model, name):
            layer.set_scale(name, scale)
        model.requires_grad_(False).train(training)


def check_layers(adapter: Adapter, part: str, model: nn.Module) -> None:
    """Check that a model has the layers that an adapter changes.

    Raises:
        SettingsError: if it lacks one.
    """
    existing = dict(model.named_modules())
    unknown = [layer for layer in adapter.layers(part) if layer not in existing]
    if unknown:
        raise SettingsError(
            f"adapters={adapter.source}: adapts {len(unknown)} layers that this model's {part} does not have, such as "
            f"{unknown[0]}; give one that was trained on a model of this architecture."
        )


def _check_factors(adapter: Adapter, part: str, expected: dict[str, Tensor]) -> None:
    given = adapter.weights[part]
    if missing := sorted(expected.keys() - given.keys()):
        raise SettingsError(
            f"adapters={adapter.source}: {len(missing)} missing keys, such as {missing[0]} of {part}; "
            "download or export the file again."
        )
    if unexpected := sorted(given.keys() - expected.keys()):
        raise SettingsError(
            f"adapters={adapter.source}: {len(unexpected)} unexpected keys, such as {unexpected[0]} of {part}; "
            "give one that was trained on a model of this architecture."
        )
    for key, value in given.items():
        if value.shape != expected[key].shape:
            raise SettingsError(
                f"adapters={adapter.source}: {key} of {part} has the shape {tuple(value.shape)} and this model takes "
                f"{tuple(expected[key].shape)}; give one that was trained on a model of this architecture."
            )


def find_layers(parts: Components, name: str) -> list[Any]:
    """Layers of peft that hold the adapter called ``name``, in the networks that have one."""
    return [layer for part in parts.adaptable for _, layer in _adapted(part, name)]


def is_dora(layers: Iterable[Any]) -> bool:
    """Whether any of peft's layers learned the lengths of its weights."""
    return any(any(getattr(layer, "use_dora", {}).values()) for layer in layers)


def set_active_adapters(parts: Components, names: list[str]) -> None:
    """Activate these adapters, and no others, in every layer that has them."""
    for part in parts.adaptable:
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter([name for name in names if name in module.r])  # type: ignore[attr-defined]
        part.requires_grad_(False)
