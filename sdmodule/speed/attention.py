"""What computes the UNet's attention, by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdmodule.errors import SettingsError, choices

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Those of ``torch.nn.functional.scaled_dot_product_attention``."""

PROCESSORS = {"plain": AttnProcessor, "xformers": XFormersAttnProcessor}
"""Those that are diffusers' processors."""


class NamedAttention(AttnProcessor2_0):
    """Torch's own, whose place no faster one takes."""


ANYWHERE = ("sdpa", "flash", "math", "plain")
"""Those that need no GPU."""

IN_THIS_BUILD = {
    "flash": torch.backends.cuda.is_flash_attention_available,
    "cudnn": torch.backends.cudnn.is_available,
}
"""Whether those that a build of torch for GPUs may lack are in this one."""


@contextmanager
def attention_by(unet: Any, name: str) -> Iterator[None]:
    """Compute a UNet's attention by the one of a name inside a ``with`` block.

    Args:
        unet: a ``UNet2DConditionModel``, where it is to run.
        name: one of ``settings.ATTENTION``.

    Raises:
        SettingsError: if this machine does not have it.
    """
    if name == "sdpa":
        yield
        return
    check_attention(name, unet.device.type)
    before = unet.attn_processors
    unet.set_attn_processor(PROCESSORS.get(name, NamedAttention)())
    try:
        with sdpa_kernel(KERNELS[name]) if name in KERNELS else nullcontext():
            yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def plain_attention(text_encoder: Any, *networks: Any) -> Iterator[None]:
    """Compute attention as two plain products inside a ``with`` block, as training in bfloat16 on CPU is faster.

    The backward pass of torch's fused attention was once seen to take four times as long there; in float32 it was
    measured since to be the faster one, and it keeps less.

    Args:
        text_encoder: a text encoder of transformers.
        networks: UNets and ControlNets; None is passed over.
    """
    present = [network for network in networks if network is not None]
    before = [network.attn_processors for network in present]
    of_text = text_encoder.config._attn_implementation
    try:
        for network in present:
            network.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
        yield
    finally:
        for network, processors in zip(present, before, strict=True):
            network.set_attn_processor(processors)
        text_encoder.set_attn_implementation(of_text)


def check_attention(name: str, device: str | None = None) -> None:
    """Check that this machine has the attention of a name, and that a device, if one is named, can use it.

    Raises:
        SettingsError: if not.
    """
    if name == "xformers" and find_spec("xformers") is None:
        raise SettingsError("speed.attention=xformers needs the package xformers; pip install xformers, or use sdpa.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda" and name not in ANYWHERE:
        raise SettingsError(
            f"speed.attention={name} needs a CUDA GPU, and this runs on {device}; give one of {choices(ANYWHERE)}."
        )
    if device == "cuda" and name in IN_THIS_BUILD and not IN_THIS_BUILD[name]():
        raise SettingsError(f"speed.attention={name} is not in this build of torch; use sdpa.")
