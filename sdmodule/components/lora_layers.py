"""Adapters of low rank: what one is, and how it is put on a model and taken from it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError

LORA, DORA, LOHA, LOKR = METHODS = ("lora", "dora", "loha", "lokr")
TRAINED = "default"
"""peft's name of the adapter that is trained."""

RANK_IS_ROWS_OF = {LORA: ("lora_A.weight",), LOHA: ("hada_w1_b",), LOKR: ("lokr_w2_b", "lokr_w1_b")}
RANK_IS_ROWS_OF[DORA] = RANK_IS_ROWS_OF[LORA]

_FACTOR = re.compile(r"\.(lora_[AB]\.weight|lora_magnitude_vector|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)$")


@dataclass
class Adapter:
    """An adapter of the UNet, and of the text encoder if it has one.

    Attributes:
        method: one of :data:`METHODS`.
        weights: for ``unet`` and ``text_encoder``, each factor under its layer: ``mid_block….to_q.lora_A.weight``.
        alphas: for each part, the layers' alpha: an adapter counts ``alpha / rank`` times. A layer that is not here
            counts once.
        source: where it came from, for messages.
    """

    method: str
    weights: dict[str, dict[str, Tensor]]
    alphas: dict[str, dict[str, float]] = field(default_factory=dict)
    source: str = ""

    def layers(self, part: str) -> dict[str, dict[str, Tensor]]:
        """The factors of each layer of a part, by layer and by the factor's name."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, value in self.weights[part].items():
            layer, factor = split_key(key)
            layers.setdefault(layer, {})[factor] = value
        return layers

    def rank(self, factors: dict[str, Tensor]) -> int | None:
        """Rank of a layer's factors; None for a Kronecker product of two whole matrices, which has none."""
        for name in RANK_IS_ROWS_OF[self.method]:
            if name in factors:
                return factors[name].shape[0]
        return None

    def config(self, part: str) -> PeftConfig:
        """What peft needs to know of a part's layers."""
        ranks, alphas = {}, {}
        for layer, factors in self.layers(part).items():
            rank = self.rank(factors)
            # a rank as large as the layer makes peft keep both matrices of a Kronecker product whole
            ranks[layer] = rank or max(max(factor.shape) for factor in factors.values())
            alphas[layer] = self.alphas.get(part, {}).get(layer, ranks[layer])
        rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
        settings: dict[str, Any] = {
            "r": rank,
            "target_modules": list(ranks),
            "rank_pattern": {re.escape(layer): own for layer, own in ranks.items() if own != rank},
            "alpha_pattern": {re.escape(layer): own for layer, own in alphas.items() if own != alpha},
        }
        if self.method in (LORA, DORA):
            return LoraConfig(lora_alpha=alpha, use_dora=self.method == DORA, **settings)
        return (LoHaConfig if self.method == LOHA else LoKrConfig)(alpha=alpha, **settings)


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def split_key(key: str) -> tuple[str, str]:
    """A factor's key as its layer and its own name."""
    found = _FACTOR.search(key)
    return (key[: found.start()], found[1]) if found else (key, "")


def extract_adapter(parts: Components, method: str, name: str = TRAINED) -> Adapter:
    """The adapter that is on a model."""
    weights, alphas = {}, {}
    for part in ("unet", "text_encoder"):
        model = getattr(parts, part)
        layers = dict(_adapted(model, name))
        if not layers:
            continue
        state = get_peft_model_state_dict(model, adapter_name=name)
        weights[part] = {key: value.detach().cpu().clone() for key, value in state.items()}
        alphas[part] = {layer: float(_alpha(found, name)) for layer, found in layers.items()}
    adapter = Adapter(method, weights, alphas, parts.source)
    _count_whole_products_once(adapter, parts, name)
    return adapter


def _alpha(layer: Any, name: str) -> float:
    return layer.lora_alpha[name] if hasattr(layer, "lora_alpha") else layer.alpha[name]


def _count_whole_products_once(adapter: Adapter, parts: Components, name: str) -> None:
    """Where a Kronecker product has no rank to divide alpha by, scale its first matrix: so other tools read it."""
    for part in adapter.weights:
        found = dict(_adapted(getattr(parts, part), name))
        for layer, factors in adapter.layers(part).items():
            if adapter.rank(factors) is None:
                factors["lokr_w1"].mul_(found[layer].scaling[name])
                del adapter.alphas[part][layer]


def _adapted(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Layers that have an adapter of this name."""
    for place, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.r:  # type: ignore[attr-defined]
            yield place, layer


def attach_adapter(parts: Components, adapter: Adapter, scale: float, name: str) -> None:
    """Put an adapter beside the weights of a model, in place; nothing of it is trained.

    Raises:
        SettingsError: if the file's layers, factors or shapes are not those of this model.
    """
    for part in adapter.weights:
        model = getattr(parts, part)
        _check_layers(adapter, part, model)
        training = model.training
        try:
            inject_adapter_in_model(adapter.config(part), model, name)
        except ValueError as error:
            raise SettingsError(
                f"adapters: {adapter.source} cannot be put on this model's {part}: {' '.join(str(error).split())}"
            ) from error
        expected = get_peft_model_state_dict(model, adapter_name=name)
        _check_factors(adapter, part, expected)
        set_peft_model_state_dict(model, dict(adapter.weights[part]), adapter_name=name)
        for _, layer in _adapted(model, name):
            layer.set_scale(name, scale)
        model.requires_grad_(False).train(training)


def _check_layers(adapter: Adapter, part: str, model: nn.Module) -> None:
    have = dict(model.named_modules())
    unknown = [layer for layer in adapter.layers(part) if layer not in have]
    if unknown:
        raise SettingsError(
            f"adapters: {adapter.source} adapts {len(unknown)} layers that this model's {part} does not have, such as "
            f"{unknown[0]}; give one that was trained on a model of this architecture."
        )


def _check_factors(adapter: Adapter, part: str, expected: dict[str, Tensor]) -> None:
    given = adapter.weights[part]
    if missing := sorted(expected.keys() - given.keys()):
        raise SettingsError(
            f"adapters: {adapter.source} lacks {len(missing)} weights, such as {missing[0]} of {part}; it is not whole."
        )
    if unused := sorted(given.keys() - expected.keys()):
        raise SettingsError(
            f"adapters: {adapter.source} holds {len(unused)} weights without a use, such as {unused[0]} of {part}."
        )
    for key, value in given.items():
        if value.shape != expected[key].shape:
            raise SettingsError(
                f"adapters: {adapter.source} has {key} of {part} in the shape {tuple(value.shape)} and this model "
                f"takes {tuple(expected[key].shape)}; give one that was trained on a model of this architecture."
            )


def make_active(parts: Components, names: list[str]) -> None:
    """Use these adapters, each where it is."""
    for part in (parts.unet, parts.text_encoder):
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter([name for name in names if name in module.r])  # type: ignore[attr-defined]
        part.requires_grad_(False)


@torch.no_grad()
def merge(parts: Components, name: str) -> None:
    """Add an adapter to the weights that it stands beside, and take it away."""
    for part in (parts.unet, parts.text_encoder):
        for place, layer in list(_adapted(part, name)):
            layer.merge(adapter_names=[name])
            parent, _, child = place.rpartition(".")
            setattr(part.get_submodule(parent), child, layer.get_base_layer())
        if hasattr(part, "peft_config"):
            del part.peft_config
