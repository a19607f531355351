"""The linear layers of the denoiser in 8 bits, by torchao: weights once, activations at each call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from sdmodule.errors import SettingsError
from sdmodule.speed.offload import point

QUANTIZE = ("none", "int8", "fp8")
FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply in 8-bit floating point: Ada and Hopper."""

MULTIPLE = 16
"""Widths of layers that 8-bit kernels multiply are multiples of this."""


@contextmanager
def quantized(network: Any, how: str) -> Iterator[None]:
    """Compute the linear layers of a network's transformer blocks in 8 bits inside a ``with`` block.

    Each row of weights and each token has a scale of its own. The weights themselves wait in the host's memory. Layers
    of adapters, and keys and values of the text, which are computed once for a batch, stay as they are.

    Args:
        network: a ``UNet2DConditionModel``.
        how: ``none``, ``int8`` or ``fp8``.

    Raises:
        SettingsError: if torchao or the GPU for it is missing.
    """
    if how == "none":
        yield
        return
    check_quantize(how, network.device.type)
    from torchao.quantization import quantize_

    layers = layers_to_quantize(network)
    chosen = {id(layer) for layer in layers}
    weights = [layer.weight for layer in layers]
    places = [weight.device for weight in weights]
    try:
        quantize_(network, configuration(how), filter_fn=lambda layer, name: id(layer) in chosen)
        for weight in weights:
            point(weight, weight.data.cpu())
        yield
    finally:
        for layer, weight, place in zip(layers, weights, places, strict=True):
            point(weight, weight.data.to(place))
            layer.weight = weight


def layers_to_quantize(network: nn.Module) -> list[nn.Linear]:
    """The linear layers of transformer blocks, without those of adapters and those that see the text alone.

    DoRA computes with the weights themselves, so layers that it adapts are left out.
    """
    found = []
    for block in network.modules():
        if not isinstance(block, BasicTransformerBlock):
            continue
        dora = {
            name.split(".lora_magnitude_vector")[0] for name, _ in block.named_parameters() if "_magnitude_" in name
        }
        for name, layer in block.named_modules():
            of_text = name.startswith(("attn2.to_k", "attn2.to_v"))
            fits = type(layer) is nn.Linear and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
            if fits and not of_text and "lora_" not in name and name.removesuffix(".base_layer") not in dora:
                found.append(layer)
    return found


def configuration(how: str) -> Any:
    """Torchao's configuration for ``int8`` or ``fp8``."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )

    if how == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    return Int8DynamicActivationInt8WeightConfig()


def check_quantize(how: str, device: str | None = None) -> None:
    """Check that torchao is installed and that the device computes in a type.

    Args:
        how: ``none``, ``int8`` or ``fp8``.
        device: type of the device; the GPU where there is one if None.

    Raises:
        SettingsError: if not.
    """
    if how == "none":
        return
    if find_spec("torchao") is None:
        raise SettingsError(f"speed.quantize={how}: the package torchao is not installed; pip install torchao.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if how == "fp8" and device != "cuda":
        raise SettingsError(f"speed.quantize=fp8: needs a CUDA GPU, and this runs on {device}; use int8 or none.")
    if how == "fp8" and (found := torch.cuda.get_device_capability()) < FP8_CAPABILITY:
        raise SettingsError(
            f"speed.quantize=fp8: needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))}, and this one "
            f"has {'.'.join(map(str, found))}; use int8 or none."
        )
