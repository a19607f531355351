"""What an adapter makes of a layer's weight, by the formula of its method, at any scale.

LoRA (Hu et al. 2021), LoHa (FedPara, Hyeon-Woo et al. 2022) and LoKr (Edalati et al. 2022) add a product of small
matrices; DoRA (Liu et al. 2024) then gives each output, or each input, a length of its own. At scale ``s`` a weight is
``W + s (W' - W)``, where ``W'`` is the weight at scale 1: so nothing at 0, and the order of several does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdmodule.components.checkpoint import Components
from sdmodule.components.lora_layers import BIAS, MAGNITUDES, METHODS, Adapter, FactorNames, check_layers
from sdmodule.errors import SettingsError, choices

EPSILON = torch.finfo(torch.float32).eps


@torch.no_grad()
def add_adapters(parts: Components, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Add adapters to a model's weights, each as it is on the model alone.

    Args:
        parts: the model.
        adapters: adapters and their scales, in any order.

    Raises:
        SettingsError: if one does not fit the model.
    """
    changes: dict[nn.Parameter, Tensor] = {}
    for adapter, scale in adapters:
        for part in adapter.weights:
            model = getattr(parts, part)
            check_layers(adapter, part, model)
            for layer, factors in adapter.layers(part).items():
                module = model.get_submodule(layer)
                change, bias = layer_change(adapter, part, layer, factors, module.weight)
                _add(changes, module.weight, scale * change)
                if bias is not None:
                    if module.bias is None:
                        module.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
                    _add(changes, module.bias, scale * bias)
    for weight, change in changes.items():
        weight.add_(change)


def _add(changes: dict[nn.Parameter, Tensor], weight: nn.Parameter, change: Tensor) -> None:
    changes[weight] = changes[weight] + change if weight in changes else change


def layer_change(
    adapter: Adapter, part: str, layer: str, factors: dict[str, Tensor], weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What an adapter at scale 1 adds to a layer's weight, and to its bias if it has one to add.

    Args:
        adapter: for its alphas, and its name in messages.
        part: ``unet`` or ``text_encoder``.
        layer: name of the layer.
        factors: of the layer, by name.
        weight: ``[out, in]`` or ``[out, in, k, k]``.

    Raises:
        SettingsError: if factors are missing or do not fit the weight.
    """
    rank = adapter.rank(factors)
    alpha = adapter.alphas.get(part, {}).get(layer)
    scaling = 1.0 if alpha is None or rank is None else alpha / rank
    check_names(adapter, part, layer, factors)
    try:
        change = scaling * product(factors).reshape(weight.shape)
        if MAGNITUDES in factors:
            change = with_lengths(weight + change, factors[MAGNITUDES]) - weight
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in factors.items())
        raise SettingsError(
            f"adapters={adapter.source}: {layer} of {part} has the shape {list(weight.shape)}, and the file has "
            f"{shapes}; give one that was trained on a model of this architecture."
        ) from error
    bias = factors.get(BIAS)
    return change, factors.get("diff_b") if bias is None else scaling * bias


def check_names(adapter: Adapter, part: str, layer: str, factors: FactorNames) -> None:
    """Check that the factors of a layer are whole.

    Raises:
        SettingsError: if one is missing, or two methods are mixed.
    """
    names = set(factors) - {MAGNITUDES, BIAS, "lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2", "diff_b"}
    whole = [{"lora_A.weight", "lora_B.weight"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"diff"}]
    whole += [first | second for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}) for second in _SECOND]
    if names in whole:
        return
    nearest = min(whole, key=lambda candidate: len(candidate ^ names))
    if missing := sorted(nearest - names):
        raise SettingsError(
            f"adapters={adapter.source}: {len(missing)} missing keys, such as {layer}.{missing[0]} of {part}; "
            "download or export the file again."
        )
    raise SettingsError(
        f"adapters={adapter.source}: {layer} of {part} has {choices(factors)}, which is not one method of "
        f"{choices(METHODS)}; download or export the file again."
    )


_SECOND: tuple[set[str], ...] = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})


def product(factors: dict[str, Tensor]) -> Tensor:
    """The product of a layer's factors, not yet scaled by ``alpha / rank``."""
    if "diff" in factors:
        return factors["diff"]
    if "lora_A.weight" in factors:
        down, up = factors["lora_A.weight"], factors["lora_B.weight"].flatten(1)
        middle = factors.get("lora_mid.weight")
        if middle is not None:  # Tucker decomposition of a convolution
            return torch.einsum("or,rs...,si->oi...", up, middle, down.flatten(1))
        return torch.einsum("or,r...->o...", up, down)
    if "hada_w1_a" in factors:
        first, second = (
            _with_core(factors.get(f"hada_t{k}"), factors[f"hada_w{k}_a"], factors[f"hada_w{k}_b"]) for k in (1, 2)
        )
        return first * second
    first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if "lokr_w2" in factors:
        second = factors["lokr_w2"]
    else:
        second = _with_core(factors.get("lokr_t2"), factors["lokr_w2_a"], factors["lokr_w2_b"])
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(first, second.contiguous())


def _with_core(core: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """The product of two factors, or of a Tucker decomposition with its core ``[r, r, k, k]``."""
    if core is None:
        return one @ other.flatten(1) if other.ndim == 2 else torch.einsum("or,r...->o...", one, other)
    return torch.einsum("ij...,ip,jr->pr...", core, one, other)


def with_lengths(weight: Tensor, lengths: Tensor) -> Tensor:
    """A weight whose rows, or columns, are given other lengths.

    Args:
        weight: ``[out, in, …]``.
        lengths: ``[out]`` or ``[1, out, 1, 1]``, as peft has them; or ``[1, in]`` or ``[1, 1, in, 1, 1]`` by inputs.
    """
    by_input = lengths.ndim > weight.ndim or (lengths.ndim == 2 == weight.ndim)
    kept = 1 if by_input else 0
    if lengths.numel() != weight.shape[kept]:
        raise RuntimeError(f"{lengths.numel()} lengths for {weight.shape[kept]}")
    others = [k for k in range(weight.ndim) if k != kept]
    shape = [-1 if k == kept else 1 for k in range(weight.ndim)]
    return weight * lengths.reshape(shape) / (torch.linalg.vector_norm(weight, dim=others, keepdim=True) + EPSILON)
