"""Layers of a UNet on CPU, each computed the way that is the fastest on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.speed.cpu import winograd, winograd_tiles
from sdmodule.speed.cpu.autotune import TORCH, Ways, fastest
from sdmodule.speed.cpu.native import attention
from sdmodule.speed.cpu.native.attention import native_attention
from sdmodule.speed.cpu.native.jit_build import is_available
from sdmodule.speed.cpu.prepacked import fused_geglu, packed_convolution, packed_linear, packs
from sdmodule.speed.cpu.tiled_attention import ALIGNED, tiled_attention
from sdmodule.speed.swap_class import swap_class


def padded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's attention to a number of keys that `ALIGNED` divides, of which those added count for nothing.

    A prompt has 77. In bfloat16 torch's products with matrices of so odd a size can take twice as long.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, M, D]``.
        value: of the same shape.

    Returns:
        ``[B, H, L, D]``.
    """
    added = -key.shape[2] % ALIGNED
    mask = query.new_zeros(1, 1, 1, key.shape[2] + added)
    mask[..., key.shape[2] :] = -torch.inf
    key, value = (F.pad(tokens, (0, 0, 0, added)) for tokens in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def linear(tokens: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer as torch computes it, ``[B, L, C]`` to ``[B, L, D]``."""
    return F.linear(tokens, layer.weight, layer.bias)


def convolved(tokens: Tensor, layer: nn.Linear) -> Tensor:
    """The same as a convolution of 1x1 over tokens, which lie as channels_last wants them.

    Some builds of torch multiply float32 matrices slower than they convolve.
    """
    image = tokens.unsqueeze(2).permute(0, 3, 1, 2)
    return F.conv2d(image, layer.weight[:, :, None, None], layer.bias).permute(0, 2, 3, 1).squeeze(2)


def geglu(tokens: Tensor, layer: GEGLU) -> Tensor:
    """A gated activation as diffusers computes it, ``[B, L, C]`` to ``[B, L, D]``."""
    return GEGLU.forward(layer, tokens)


def winograd_convolution(image: Tensor, layer: Any) -> Tensor:
    """A convolution of 3x3 with two thirds of the products; ``layer.rows`` keeps its weights."""
    if layer.rows is None:
        layer.rows = winograd.kernels_of(layer, image)
    return winograd.convolve(image, layer.rows, layer.bias)


def convolution_of_tiles(image: Tensor, layer: Any) -> Tensor:
    """A convolution of 3x3 in float32 with a quarter of the products; ``layer.matrices`` keeps its weights."""
    if layer.matrices is None:
        layer.matrices = winograd_tiles.matrices_of(layer)
    return winograd_tiles.convolve(image, layer.matrices, layer.bias)


def attentions(query: Tensor, key: Tensor, value: Tensor) -> Ways:
    """The ways to compute attention of such tensors on this machine."""
    ways = PADDED_ATTENTIONS if key.shape[2] % ALIGNED else ATTENTIONS
    native = attention.fits(query, key, value) and is_available(attention.SOURCE)
    return {**ways, "native": native_attention} if native else ways


ATTENTIONS: Ways = {TORCH: F.scaled_dot_product_attention, "tiles": tiled_attention}
PADDED_ATTENTIONS: Ways = {**ATTENTIONS, "padded": padded_attention}
LINEARS: Ways = {TORCH: linear, "convolution": convolved}
PACKED_LINEARS: Ways = {**LINEARS, "packed": packed_linear}
GEGLUS: Ways = {TORCH: geglu, "fused": fused_geglu}
CONVOLUTIONS: Ways = {TORCH: packed_convolution, "winograd": winograd_convolution}
TILED_CONVOLUTIONS: Ways = {**CONVOLUTIONS, "winograd tiles": convolution_of_tiles}
KEPT = ("packed", "rows", "matrices")
"""What convolutions keep of their weights, each of the ways its own."""


@contextmanager
def fastest_kernels(unet: Any) -> Iterator[None]:
    """Run a UNet's layers the way that is the fastest here, inside a ``with`` block.

    Layers keep their weights in the order in which they are multiplied, and convolutions by Winograd's algorithms a
    third more of them, or in float32, of large images, four times as many: there are then two to two and a half times
    as many in all, and in float32 three times at 1,024 pixels and four at 2,048. They must not change meanwhile, unless
    by training: a call with gradients drops what is kept.

    Images differ by rounding. What a layer's shape is, not how many images there are, decides, so that an image is
    the same whatever its batch.

    Args:
        unet: a ``UNet2DConditionModel`` on CPU, not compiled.
    """
    blocks = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    with fastest_convolutions(unet), fastest_blocks(blocks):
        yield


@contextmanager
def fastest_convolutions(module: nn.Module) -> Iterator[None]:
    """Run a module's convolutions the way that is the fastest here, inside a ``with`` block; see `fastest_kernels`."""
    convolutions = [layer for layer in module.modules() if type(layer) is nn.Conv2d and _keeps_weights(layer)]
    with swap_class(FastestConv2d, convolutions, keeps=KEPT):
        yield


@contextmanager
def fastest_blocks(blocks: Sequence[BasicTransformerBlock]) -> Iterator[None]:
    """Run the layers of transformer blocks the way that is the fastest here, inside a ``with`` block.

    As with `fastest_kernels`, their weights must not change meanwhile, unless by training.
    """
    with fastest_attention(blocks), fastest_linears(blocks):
        yield


@contextmanager
def fastest_attention(blocks: Iterable[BasicTransformerBlock]) -> Iterator[None]:
    """Give transformer blocks the fastest attention inside a ``with`` block, unless another was asked for by name."""
    layers = [layer for block in blocks for layer in (block.attn1, block.attn2) if layer is not None]
    plain = [layer for layer in layers if type(layer.processor) is AttnProcessor2_0]
    before = [layer.processor for layer in plain]
    try:
        for layer in plain:
            layer.set_processor(FASTEST)
        yield
    finally:
        for layer, own in zip(plain, before, strict=True):
            if layer.processor is FASTEST:  # and none that was set in between
                layer.set_processor(own)


class FastestAttention(AttnProcessor2_0):
    """A processor of diffusers whose attention, where no gradients are asked for, is the fastest of this machine."""

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
            or _is_as_usual(attn)
        ):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for tokens in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        shape = ("attention", query.shape[1:], key.shape[2], query.dtype)
        joined = fastest(attentions(query, key, value), shape, query, key, value).transpose(1, 2).flatten(2)
        result = attn.to_out[1](attn.to_out[0](joined))
        return result if attn.rescale_output_factor == 1 else result / attn.rescale_output_factor


def _is_as_usual(layer: nn.Module, *kept: str) -> bool:
    """Whether a layer runs as torch has it: for gradients, and for a compiler, which chooses by itself.

    With gradients what it kept of its weights is dropped, since a step may follow that changes them.
    """
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled():
        for name in kept:
            layer.__dict__.pop(name, None)
        return True
    return False


FASTEST = FastestAttention()
"""One for all layers, as it knows nothing of them."""


@contextmanager
def fastest_linears(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Have the linear layers of modules run the way that is the fastest here, inside a ``with`` block."""
    layers = [layer for block in blocks for layer in block.modules()]
    with ExitStack() as stack:
        linears, gated = ([layer for layer in layers if type(layer) is kind] for kind in (nn.Linear, GEGLU))
        stack.enter_context(swap_class(FastestLinear, linears, keeps=("packed",)))
        stack.enter_context(swap_class(FastestGEGLU, gated, keeps=("halves",)))
        yield


class FastestLinear(nn.Linear):
    """A ``Linear`` that runs the way that is the fastest here; one becomes it, and ceases, by its ``__class__``."""

    packed: Tensor | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        """What it gives for tokens ``[B, L, C]``."""
        if _is_as_usual(self, "packed") or input.ndim != 3:
            return super().forward(input)
        mixed = _is_mixed(input, self.weight)
        ways = LINEARS if mixed or not packs(input.dtype) else PACKED_LINEARS
        return fastest(ways, ("linear", input.shape[1:], self.out_features, input.dtype, mixed), input, self)


class FastestGEGLU(GEGLU):
    """A ``GEGLU`` (Shazeer 2020) that in bfloat16 runs the way that is the fastest here."""

    halves: list[tuple[Tensor, Tensor | None]] | None = None

    @override
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, L, C]`` to ``[B, L, D]``."""
        if _is_as_usual(self, "halves") or args or kwargs or not self._is_plain(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        shape = ("geglu", hidden_states.shape[1:], self.proj.out_features, hidden_states.dtype)
        return fastest(GEGLUS, shape, hidden_states, self)

    def _is_plain(self, tokens: Tensor) -> bool:
        """Whether the layer within is a linear one in bfloat16 that nobody listens to, and none with an adapter."""
        layer = self.proj
        listened = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        if type(layer) is not FastestLinear or listened or tokens.ndim != 3:
            return False
        return tokens.dtype == torch.bfloat16 and packs(tokens.dtype) and not _is_mixed(tokens, layer.weight)


class FastestConv2d(nn.Conv2d):
    """A ``Conv2d`` that keeps its weights in order, and runs the way that is the fastest here."""

    packed: Tensor | None = None
    rows: winograd.Kernels | None = None
    matrices: Tensor | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Convolve an image ``[B, C, h, w]``; the result has its channels innermost."""
        if _is_as_usual(self, *KEPT) or input.ndim != 4 or _is_mixed(input, self.weight):
            return super().forward(input)
        if not winograd.is_ordinary(self, input):
            return packed_convolution(input, self)
        tiled = winograd_tiles.is_tiled(self, input)
        ways = TILED_CONVOLUTIONS if tiled else CONVOLUTIONS
        return fastest(ways, ("convolution", input.shape[1:], self.out_channels, input.dtype, tiled), input, self)


def _keeps_weights(layer: nn.Conv2d) -> bool:
    """Whether a convolution's weights can be kept in order."""
    padded = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return padded and packs(layer.weight.dtype)


def _is_mixed(tokens: Tensor, weight: Tensor) -> bool:
    """Whether tokens and weights are of two types."""
    return tokens.dtype != weight.dtype or torch.is_autocast_enabled("cpu")
