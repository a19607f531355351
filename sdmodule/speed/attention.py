"""Attention backends of the UNet, chosen by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor
from torch.backends.cuda import SDPAParams
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from sdmodule.components.precision import computes_in
from sdmodule.errors import SettingsError, choices

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Backends of ``torch.nn.functional.scaled_dot_product_attention``."""

PROCESSORS = {"plain": AttnProcessor, "xformers": XFormersAttnProcessor}
"""Backends that are attention processors of diffusers."""

WITHOUT_GPU = ("sdpa", "flash", "math", "plain")
"""Backends that also run on a CPU."""

IN_THIS_BUILD = {
    "flash": torch.backends.cuda.is_flash_attention_available,
    "cudnn": torch.backends.cudnn.is_available,
}
"""Whether this build of torch has a backend that a CUDA build may lack."""

CAN_USE = {
    "flash": torch.backends.cuda.can_use_flash_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
}
"""Whether the GPU has a kernel of a backend for certain queries, keys and values."""


class NamedAttention(AttnProcessor2_0):
    """Torch's attention with one of its backends.

    The backend is chosen around each call: the VAE, whose only head is too wide for most kernels, keeps torch's choice,
    and compiled code is that of its backend.

    Args:
        backend: the backend.
    """

    def __init__(self, backend: SDPBackend) -> None:
        super().__init__()
        self.backend = backend

    @override
    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        with sdpa_kernel(self.backend):
            return super().__call__(*arguments, **options)


@contextmanager
def attention_backend(name: str, *networks: Any) -> Iterator[None]:
    """Compute the attention of networks with one backend inside a ``with`` block.

    Args:
        name: one of ``speed_settings.ATTENTION``; ``sdpa`` changes nothing.
        networks: UNets and ControlNets, already on their device.

    Raises:
        SettingsError: if this machine does not have the backend.
    """
    if name == "sdpa":
        yield
        return
    before = [network.attn_processors for network in networks]
    for network in networks:
        check_attention(name, network.device.type)
        network.set_attn_processor(PROCESSORS[name]() if name in PROCESSORS else NamedAttention(SDPA_BACKENDS[name]))
    try:
        # every head has this one kernel, so text encoders and VAE take it too, as they always did
        with sdpa_kernel(SDPBackend.MATH) if name == "math" else nullcontext():
            yield
    finally:
        for network, processors in zip(networks, before, strict=True):
            network.set_attn_processor(processors)


@contextmanager
def plain_attention(text_encoders: Sequence[Any], *networks: Any) -> Iterator[None]:
    """Compute attention as two plain matrix products inside a ``with`` block: faster training in bfloat16 on CPU.

    There the backward pass of torch's fused attention once took four times as long. In float32 fused attention is the
    faster one, and it keeps less memory.

    Args:
        text_encoders: of transformers.
        networks: UNets and ControlNets; None is skipped.
    """
    present = [network for network in networks if network is not None]
    before = [network.attn_processors for network in present]
    text_before = [encoder.config._attn_implementation for encoder in text_encoders]
    try:
        for network in present:
            network.set_attn_processor(AttnProcessor())
        for encoder in text_encoders:
            encoder.set_attn_implementation("eager")
        yield
    finally:
        for network, processors in zip(present, before, strict=True):
            network.set_attn_processor(processors)
        for encoder, implementation in zip(text_encoders, text_before, strict=True):
            encoder.set_attn_implementation(implementation)


def check_attention(name: str, device: str | None = None) -> None:
    """Check that this machine has an attention backend.

    Args:
        name: one of ``speed_settings.ATTENTION``.
        device: ``cuda`` or ``cpu``; the GPU where there is one if None.

    Raises:
        SettingsError: if a package, a GPU or a build of torch is missing.
    """
    if name == "xformers" and find_spec("xformers") is None:
        raise SettingsError(
            "speed.attention=xformers: the package xformers is not installed; pip install xformers, or use sdpa."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda" and name not in WITHOUT_GPU:
        raise SettingsError(
            f"speed.attention={name}: needs a CUDA GPU, and this runs on {device}; choose one of "
            f"{choices(WITHOUT_GPU)}."
        )
    if device == "cuda" and name in IN_THIS_BUILD and not IN_THIS_BUILD[name]():
        raise SettingsError(f"speed.attention={name}: not in this build of torch; use sdpa.")


def check_kernels(name: str, network: Any) -> None:
    """Check that the GPU has a backend's kernel for the heads of a network in the precision that it computes in.

    Args:
        name: one of ``speed_settings.ATTENTION``.
        network: a UNet or ControlNet, already on its device, inside autocast if it runs there.

    Raises:
        SettingsError: if a kernel is missing, with torch's reason.
    """
    if network.device.type != "cuda" or name not in CAN_USE:
        return
    dtype = computes_in(network)
    for width, tokens in product(head_widths(network), (64, 77)):  # of an image, and of a text
        queries, keys = (torch.empty(1, 1, n, width, device=network.device, dtype=dtype) for n in (64, tokens))
        params = SDPAParams(queries, keys, keys, None, 0.0, False, False)
        if CAN_USE[name](params):
            continue
        with warnings.catch_warnings(record=True) as reasons:
            warnings.simplefilter("always")
            CAN_USE[name](params, debug=True)
        said = "; ".join(str(reason.message).partition(" (Triggered")[0].rstrip(".") for reason in reasons)
        raise SettingsError(
            f"speed.attention={name}: this GPU has no such kernel for heads of {width} in "
            f"{str(dtype).removeprefix('torch.')}; use sdpa{f' (torch says: {said})' if said else ''}."
        )


def head_widths(network: Any) -> list[int]:
    """Widths of the attention heads of a network."""
    return sorted({layer.inner_dim // layer.heads for layer in network.modules() if isinstance(layer, Attention)})
