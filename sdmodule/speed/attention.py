"""Attention backends of the UNet, chosen by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

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


class NamedAttention(AttnProcessor2_0):
    """Torch's attention by a backend asked for by name; a type of its own, so that ``speed.cpu`` does not replace it.

    The backend is chosen inside the call, where compiled code sees it: code compiled for one backend is then not run
    for another. Nor does the choice hold for the text encoder and the VAE, whose heads a backend may not support.

    Args:
        backend: the backend.
    """

    def __init__(self, backend: SDPBackend) -> None:
        super().__init__()
        self.backend = backend

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(self.backend):
            return super().__call__(*args, **kwargs)


@contextmanager
def attention_backend(unet: Any, name: str) -> Iterator[None]:
    """Compute a UNet's attention with one backend inside a ``with`` block.

    Args:
        unet: a ``UNet2DConditionModel``, already on its device.
        name: one of ``speed_settings.ATTENTION``; ``sdpa`` changes nothing.

    Raises:
        SettingsError: if this machine does not have the backend.
    """
    if name == "sdpa":
        yield
        return
    check_attention(name, unet.device.type)
    before = unet.attn_processors
    unet.set_attn_processor(NamedAttention(SDPA_BACKENDS[name]) if name in SDPA_BACKENDS else PROCESSORS[name]())
    try:
        yield
    finally:
        unet.set_attn_processor(before)


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
