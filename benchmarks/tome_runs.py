"""What the benchmark of token merging runs: model, variants, and timed runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from sdmodule.components.checkpoint import Components, load_components, load_part
from sdmodule.components.schedulers import make_scheduler
from sdmodule.components.source import ASSETS
from sdmodule.data.toy.scenes import caption, sample_single
from sdmodule.families.recognize import STABLE_DIFFUSION
from sdmodule.sampling.pipeline import sample_requests
from sdmodule.sampling.requests import TEXT2IMAGE, build_requests
from sdmodule.sampling.schedule import check_settings
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.cpu.kernels import fastest_kernels
from sdmodule.speed.layout import channels_last
from sdmodule.speed.memory import retain_freed_memory
from sdmodule.tome.apply import apply_merging
from sdmodule.tome.token_merging import OFF, TokenMerging

BACKEND = "inductor"
"""Compiler backend."""

IMAGES_PER_CALL = 5
WHOLE = {"merge_attn": True, "merge_crossattn": True, "merge_mlp": True}
ENGINES: dict[str, dict[str, Any]] = {
    "tomesd": {"engine": "tomesd"},
    "exact": {"engine": "exact"},
    "window": {"engine": "window"},
    "window, whole block": {"engine": "window", **WHOLE},
}
"""The engines compared; the first is the reference."""


EAGER, COMPILED, ROUNDING = MODES = ("eager", "compiled", "rounding")


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: name of the engine.
        merging: its settings.
        mode: how layers are computed: ``eager``; ``compiled``, with compiled transformer blocks; or ``rounding``, with
            the layout, kernels and kept memory of ``speed=rounding`` on CPU.
    """

    name: str
    merging: TokenMerging
    mode: str = EAGER


def load(pretrained: str | None, precision: str) -> Components:
    """A model on the device in channels_last; by default Stable Diffusion 1.5 with random weights.

    The random model has the tokenizer of the embedded one.
    """
    if pretrained:
        parts = load_components(pretrained)
    else:
        torch.manual_seed(0)
        folder = ASSETS / "configs" / "sd1"
        made = {name: load_part(name, str(folder), scratch=True) for name in STABLE_DIFFUSION.models}
        parts = Components(
            **made,
            tokenizer=load_components("tiny").tokenizer,
            scheduler=make_scheduler(None, load_part("scheduler", str(folder)).config),
            source="Stable Diffusion 1.5, random weights",
        )
    device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, precision)
    for network in parts.networks.values():
        network.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    return parts


def variants(ratios: Sequence[float], max_downsample: int, compiled: bool) -> list[Variant]:
    """The variants to measure, unmerged first."""
    listed = [Variant("none", OFF)]
    for ratio in ratios:
        for name, options in ENGINES.items():
            merging = TokenMerging(ratio=ratio, max_downsample=max_downsample, **options)
            listed.append(Variant(name, merging))
    modes = [COMPILED] * compiled + [ROUNDING] * (not torch.cuda.is_available())
    return listed + [Variant(v.name, v.merging, mode) for mode in modes for v in listed]


@contextmanager
def in_mode(unet: Any, mode: str) -> Iterator[None]:
    """Compute a UNet's layers in a mode inside a ``with`` block; compiled code is kept for the next turn."""
    if mode == COMPILED:
        torch._dynamo.config.recompile_limit = 256
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock) and getattr(block, "_compiled_call_impl", None) is None:
                block.compile(dynamic=False, backend=BACKEND)
    torch.compiler.set_stance("default" if mode == COMPILED else "force_eager")
    try:
        with ExitStack() as stack:
            if mode == ROUNDING:
                stack.enter_context(retain_freed_memory())
                stack.enter_context(channels_last(unet))
                stack.enter_context(fastest_kernels(unet))
            yield
    finally:
        torch.compiler.set_stance("default")


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Wall time, or CPU time of this process, which other work on the machine changes little."""


def seconds_of(call: Callable[[], Tensor], device: torch.device, clock: str) -> tuple[float, Tensor]:
    """Seconds and result of one call, with an idle GPU before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = CLOCKS[clock]()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCKS[clock]() - start, result


@torch.no_grad()
def forward(parts: Components, variant: Variant, size: int, clock: str = "wall", seed: int = 0) -> tuple[float, Tensor]:
    """Output ``[2, 4, h, w]`` of the UNet for a seed's input, and the seconds of its second call.

    The first call transforms weights for all others, and is only one step in fifty.
    """
    unet, side = parts.unet, size // parts.pixels_per_latent
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=generator).repeat(2, 1, 1, 1)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    latents, text = (x.to(unet.device, unet.dtype) for x in (latents, text))
    latents = latents.contiguous(memory_format=torch.channels_last)
    with in_mode(unet, variant.mode), apply_merging(unet, variant.merging, [seed], (side, side)):
        result = unet(latents, 500, encoder_hidden_states=text).sample
        return seconds_of(lambda: unet(latents, 500, encoder_hidden_states=text).sample, unet.device, clock)[0], result


def images(parts: Components, variant: Variant, size: int, images: int, steps: int) -> tuple[float, Tensor]:
    """Seconds of the published protocol, from text to decoded images, and the images ``[images, 3, H, W]``."""
    settings = SamplingSettings(scheduler="ddim", steps=steps, height=size, width=size, merging=variant.merging)
    check_settings(parts, settings, TEXT2IMAGE)
    rng, batches, seconds = random.Random(0), [], 0.0
    for first in range(0, images, IMAGES_PER_CALL):
        prompt = caption(sample_single(rng))
        requests = build_requests(prompt, num_images_per_prompt=min(IMAGES_PER_CALL, images - first), seed=first)
        with in_mode(parts.unet, variant.mode):
            samples = sample_requests(parts, requests, settings)
        seconds += sum(samples.seconds.values())
        batches.append(samples.decoded)
    return seconds, torch.cat(batches)


def relative_error(result: Tensor, wanted: Tensor) -> float:
    """Relative L2 error."""
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())


def psnr(result: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [0, 1], in dB."""
    return float(-10 * (result.double() - wanted.double()).square().mean().log10())


def forward_error(parts: Components, variant: Variant, size: int, unmerged: Variant) -> float:
    """Relative error of one call of the UNet, against the unmerged one."""
    if variant == unmerged:
        return 0.0
    return relative_error(forward(parts, variant, size)[1], forward(parts, unmerged, size)[1])
