"""Speed settings applied to a model for many batches: memory, layout, attention, kernels, compilation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from sdmodule.components.checkpoint import Components
from sdmodule.speed.attention import attention_backend, plain_attention
from sdmodule.speed.compile import compiled
from sdmodule.speed.cpu.kernels import fastest_convolutions, fastest_kernels
from sdmodule.speed.layout import channels_last
from sdmodule.speed.memory import retain_freed_memory
from sdmodule.speed.speed_settings import SpeedSettings
from sdmodule.speed.tf32 import tf32, uses_tf32
from sdmodule.speed.vae_slicing import vae_slicing


@contextmanager
def apply_speed(parts: Components, settings: SpeedSettings, work: float = math.inf) -> Iterator[None]:
    """Apply speed settings to a model inside a ``with`` block, and restore the model afterwards.

    What differs from step to step (guidance interval, DeepCache) is applied by the sampling loop.

    Args:
        parts: the model.
        settings: what to apply.
        work: denoising steps of images of 512 pixels that are ahead.

    Raises:
        SettingsError: for an attention backend that this machine does not have.
    """
    device, networks = parts.unet.device.type, accelerated(parts)
    with ExitStack() as stack:
        if parts.refiner is not None:
            stack.enter_context(apply_speed(parts.refiner, settings, work))
        if uses_tf32(device, settings):
            stack.enter_context(tf32())
        if settings.keep_memory and device == "cpu":
            stack.enter_context(retain_freed_memory())
        if settings.channels_last_in(parts.unet.dtype, device):
            stack.enter_context(channels_last(*networks, parts.vae))
        stack.enter_context(vae_slicing(parts.vae, settings.decode))
        stack.enter_context(attention_backend(settings.attention, *networks))
        if settings.fastest_on(device):
            stack.enter_context(fastest_kernels(parts.unet))
            if parts.vae.dtype == torch.float32:  # a VAE in 16 bits may switch to float32 while it decodes
                stack.enter_context(fastest_convolutions(parts.vae))
        which = settings.compile_on(device, work)
        for network in networks if which != "none" else ():
            stack.enter_context(compiled(network, which))
        yield


def accelerated(parts: Components) -> list[Any]:
    """The networks that run at every step: the UNet, and on a GPU its ControlNets.

    On a CPU these stay as they are, so that their images are those of earlier releases to the bit.
    """
    nets = [] if parts.unet.device.type == "cpu" else parts.controlnets
    return [parts.unet, *(net for net in nets if hasattr(net, "attn_processors"))]  # a T2I-Adapter runs once


@contextmanager
def apply_training_speed(parts: Components, device: str, precision: str) -> Iterator[None]:
    """Make a model train faster inside a ``with`` block.

    On a GPU, float32 matrices are multiplied in TF32. On a CPU, freed memory is kept, and attention in bfloat16 is
    plain.

    Args:
        parts: the model.
        device: type of the device, such as ``cpu``.
        precision: the trainer's.
    """
    with ExitStack() as stack:
        if uses_tf32(device):
            stack.enter_context(tf32())
        if device == "cpu":
            stack.enter_context(retain_freed_memory())
        if training_attention(device, precision) == "plain":
            stack.enter_context(
                plain_attention([encoder for _, encoder in parts.text_encoders], parts.unet, parts.controlnet)
            )
        yield


def training_attention(device: str, precision: str) -> str:
    """Attention backend of training: ``sdpa``, except that two matrix products are faster in bfloat16 on a CPU."""
    return "plain" if device == "cpu" and "bf16" in precision else "sdpa"
