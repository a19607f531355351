"""Speed settings applied to a model for many batches: memory, layout, attention, kernels, compilation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from sdmodule.components.checkpoint import Components
from sdmodule.speed.attention import attention_backend, plain_attention
from sdmodule.speed.compile import compile_function, compiled
from sdmodule.speed.cpu.kernels import fastest_convolutions, fastest_kernels
from sdmodule.speed.fused_qkv import fused_qkv
from sdmodule.speed.fused_step import fusing_steps
from sdmodule.speed.layout import channels_last
from sdmodule.speed.memory import retain_freed_memory
from sdmodule.speed.offload import check_offload, groups_of, offloaded
from sdmodule.speed.quantize import quantized
from sdmodule.speed.speed_settings import SpeedSettings
from sdmodule.speed.step_graphs import recording_steps
from sdmodule.speed.tf32 import tf32, uses_tf32
from sdmodule.speed.vae_slicing import vae_slicing


@contextmanager
def apply_speed(
    parts: Components, settings: SpeedSettings, work: float = math.inf, device: torch.device | None = None
) -> Iterator[None]:
    """Apply speed settings to a model inside a ``with`` block, and restore the model afterwards.

    What differs from step to step (guidance interval, DeepCache) is applied by the sampling loop.

    Args:
        parts: the model.
        settings: what to apply.
        work: denoising steps of images of 512 pixels that are ahead.
        device: where weights that are offloaded compute; if None, where the model is, or a GPU.

    Raises:
        SettingsError: for an attention backend that this machine does not have, or offloading without a GPU.
    """
    models = (parts,) if parts.refiner is None else (parts, parts.refiner)
    place = device or parts.unet.device
    if settings.offload != "none":
        if device is None and place.type == "cpu" and torch.cuda.is_available():
            place = torch.device(f"cuda:{torch.cuda.current_device()}")
        check_offload(settings.offload, place.type)
    with ExitStack() as stack:
        if uses_tf32(place.type, settings):
            stack.enter_context(tf32())
        for model in models:
            if settings.channels_last_in(model.unet.dtype, place.type):
                stack.enter_context(channels_last(*accelerated(model, place.type), model.vae))
        if settings.offload != "none":
            stack.enter_context(offloaded(groups_of(parts), place, settings.offload))
        for model in models:
            stack.enter_context(_applied(model, settings, work))
        yield


@contextmanager
def _applied(parts: Components, settings: SpeedSettings, work: float) -> Iterator[None]:
    """What is applied to one model once its weights are where they belong."""
    device = parts.unet.device.type
    networks = accelerated(parts)
    with ExitStack() as stack:
        if settings.keep_memory and device == "cpu":
            stack.enter_context(retain_freed_memory())
        stack.enter_context(vae_slicing(parts.vae, settings.decode))
        stack.enter_context(attention_backend(settings.attention, *networks))
        if settings.kernels == "fastest" and settings.quantize == settings.offload == "none":
            stack.enter_context(fused_qkv(parts.unet))
        if settings.fastest_on(device):
            stack.enter_context(fastest_kernels(parts.unet))
            if parts.vae.dtype == torch.float32:  # a VAE in 16 bits may switch to float32 while it decodes
                stack.enter_context(fastest_convolutions(parts.vae))
        stack.enter_context(quantized(parts.unet, settings.quantize))
        which = settings.compile_on(device, work)
        for network in networks if which != "none" else ():
            stack.enter_context(compiled(network, which))
        if which != "none" and device == "cuda":  # a CPU takes longer to compile it than it saves
            stack.enter_context(fusing_steps(parts.unet, compile_function))
        if settings.cuda_graphs and device == "cuda":
            graphs = stack.enter_context(recording_steps(parts.unet))
            if settings.offload != "none":
                graphs.give_up(f"not with speed.offload={settings.offload}")
        yield


def accelerated(parts: Components, device: str | None = None) -> list[Any]:
    """The networks that run at every step: the UNet, and on a GPU its ControlNets.

    On a CPU these stay as they are, so that their images are those of earlier releases to the bit.

    Args:
        parts: the model.
        device: type of the device that it computes on; where its UNet is if None.
    """
    nets = [] if (device or parts.unet.device.type) == "cpu" else parts.controlnets
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
        if device == "cpu" and not isinstance(parts.unet, FSDPModule):  # gathered weights would fragment it
            stack.enter_context(retain_freed_memory())
        if training_attention(device, precision) == "plain":
            stack.enter_context(
                plain_attention([encoder for _, encoder in parts.text_encoders], parts.unet, parts.controlnet)
            )
        yield


def training_attention(device: str, precision: str) -> str:
    """Attention backend of training: ``sdpa``, except that two matrix products are faster in bfloat16 on a CPU."""
    return "plain" if device == "cpu" and "bf16" in precision else "sdpa"
