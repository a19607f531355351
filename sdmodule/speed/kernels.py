"""On CPU, which of several equal computations is the fastest: measured once for each shape, and remembered."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.atomic import settle
from sdmodule.data.fingerprints import fingerprint
from sdmodule.speed.packed import packed_convolutions, packed_linear, packs
from sdmodule.speed.tiled_attention import accurate_attention, tiled_attention

TORCH = "torch"
"""What torch itself runs; anything else must be faster by some margin."""

MARGIN = 1.1
"""How many times faster: a choice for good should not hang on a busy moment of the machine."""

TRIALS = 5
GENERATION = 5
"""Of the ways below; another number has all of them measured anew."""


def linear(tokens: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer as torch computes it, ``[B, L, C]`` to ``[B, L, D]``."""
    return F.linear(tokens, layer.weight, layer.bias)


def convolved(tokens: Tensor, layer: nn.Linear) -> Tensor:
    """The same as a convolution of 1x1 over tokens, which lie as channels_last wants them.

    Some builds of torch multiply float32 matrices slower than they convolve.
    """
    picture = tokens.unsqueeze(2).permute(0, 3, 1, 2)
    return F.conv2d(picture, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1).squeeze(2)


Ways = Mapping[str, Callable[..., Tensor]]

ATTENTIONS: Ways = {TORCH: F.scaled_dot_product_attention, "tiles": tiled_attention}
ACCURATE_ATTENTIONS: Ways = {TORCH: F.scaled_dot_product_attention, "accurate tiles": accurate_attention}
LINEARS: Ways = {TORCH: linear, "convolution": convolved}
PACKED_LINEARS: Ways = {**LINEARS, "packed": packed_linear}


@contextmanager
def fastest_kernels(unet: Any) -> Iterator[None]:
    """Run a UNet's attention and linear layers the way that is the fastest here, inside a ``with`` block.

    In bfloat16 convolutions keep their weights in the order in which they are multiplied, and so do linear layers where
    that is faster: at most a second copy of the UNet's weights.

    Pictures differ by rounding. What a layer's shape is, not how many pictures there are, decides, so that a picture is
    the same whatever its batch.

    Args:
        unet: a ``UNet2DConditionModel`` on CPU, not compiled.
    """
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    with ExitStack() as stack:
        stack.enter_context(packed_convolutions(unet))
        stack.enter_context(attention_of(blocks, FASTEST))
        stack.enter_context(fastest_linears(blocks))
        yield


@contextmanager
def attention_of(blocks: Iterable[BasicTransformerBlock], processor: FastestAttention) -> Iterator[None]:
    """Give transformer blocks a processor inside a ``with`` block, but where another was asked for by name."""
    layers = [layer for block in blocks for layer in (block.attn1, block.attn2) if layer is not None]
    plain = [layer for layer in layers if type(layer.processor) is AttnProcessor2_0]
    before = [layer.processor for layer in plain]
    try:
        for layer in plain:
            layer.set_processor(processor)
        yield
    finally:
        for layer, own in zip(plain, before, strict=True):
            if layer.processor is processor:  # and none that was set in between
                layer.set_processor(own)


class FastestAttention(AttnProcessor2_0):
    """A processor of diffusers whose attention, where no gradients are asked for, is the fastest of this machine.

    Args:
        ways: functions of query, key and value, torch's own one of them.
        least: how many scores a head has at least; where it has fewer, torch's own is used.
    """

    def __init__(self, ways: Ways, least: int = 0) -> None:
        super().__init__()
        self.ways, self.least = ways, least

    def __call__(  # noqa: D102
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        unusual = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attention_mask)
        if (
            attn.residual_connection
            or any(part is not None and part is not False for part in unusual)
            or hidden_states.dtype == torch.float16  # in which tiles may overflow
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for tokens in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        shape = ("attention", *self.ways, query.shape[1:], key.shape[2], query.dtype)
        if query.shape[2] * key.shape[2] < self.least:
            seen = self.ways[TORCH](query, key, value)
        else:
            seen = fastest(self.ways, shape, query, key, value)
        joined = seen.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](joined)) / attn.rescale_output_factor


FASTEST = FastestAttention(ATTENTIONS)
"""For all layers of ``speed.kernels=fastest``."""

MANY = 2**18
"""Scores of a head: those of Stable Diffusion's largest layers at 512 pixels, merged or not, and of their text."""

MERGED = {"exact": FastestAttention(ACCURATE_ATTENTIONS, MANY), "window": FastestAttention(ATTENTIONS, MANY)}
"""For the blocks that an engine of token merging merges; with ``exact`` it rounds no more than torch's."""


@contextmanager
def fastest_linears(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Have the linear layers of modules run the way that is the fastest here, inside a ``with`` block."""
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear]
    try:
        for layer in layers:
            layer.__class__ = FastestLinear
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            layer.__dict__.pop("packed", None)


class FastestLinear(nn.Linear):
    """A ``Linear`` that runs the way that is the fastest here; one becomes it, and ceases, by its ``__class__``."""

    packed: Tensor | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        """What it gives for tokens ``[B, L, C]``."""
        if input.ndim != 3 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        mixed = input.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu")
        ways = LINEARS if mixed or not packs(input.dtype) else PACKED_LINEARS
        return fastest(ways, ("linear", input.shape[1:], self.out_features, input.dtype, mixed), input, self)


CHOSEN: dict[Any, str] = {}
"""What this process knows of shapes."""


def fastest(ways: Ways, shape: tuple[Any, ...], *arguments: Any) -> Tensor:
    """Compute something the way that is the fastest for its shape on this machine.

    Args:
        ways: functions that take the arguments and give the same but for rounding, `TORCH` one of them.
        shape: what the choice depends on.
        arguments: what is computed; measured with, where nothing is known of the shape.
    """
    name = CHOSEN.get(shape)
    if name is None:
        name = CHOSEN[shape] = remembered(ways, shape, arguments)
    return ways[name](*arguments)


def remembered(ways: Ways, shape: tuple[Any, ...], arguments: tuple[Any, ...]) -> str:
    """The name of the fastest way: what was found here earlier, or else what is found now and written down.

    Choices lie in ``~/.cache/sdmodule/kernels``. Where that cannot be written, each process measures by itself.
    """
    file = choices_folder() / fingerprint(*shape)
    with suppress(OSError, UnicodeDecodeError):
        if (name := file.read_text(encoding="utf-8")) in ways:
            return name
    name = measured(ways, arguments)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        settled = settle(file, name)  # the processes of a run choose alike: the first one's choice holds
        return settled if settled in ways else name
    return name


def measured(ways: Ways, arguments: tuple[Any, ...]) -> str:
    """The name of the fastest way; they run in turn, and the best of their times are compared."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + TRIALS):  # the first warms up
        for name, way in ways.items():
            start = time.perf_counter()
            way(*arguments)
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(taken[1:]) for name, taken in seconds.items()}
    fast = min(best, key=lambda name: best[name])
    return fast if best[fast] * MARGIN < best[TORCH] else TORCH


@cache
def choices_folder() -> Path:
    """Where this machine's choices are kept: those of a processor, a version of torch and a number of threads."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    processor = next((line for line in lines if line.startswith("model name")), platform.processor())
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    machine = (
        GENERATION,
        processor,
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        torch.get_num_threads(),
    )
    return home / "sdmodule" / "kernels" / fingerprint(*machine)
