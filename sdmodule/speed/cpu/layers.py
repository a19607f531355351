"""Layers that choose among several kernels for one computation; `sdmodule.speed.cpu.kernels` puts them in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.speed.cpu import winograd, winograd_tiles
from sdmodule.speed.cpu.autotune import TORCH, Candidates, fastest
from sdmodule.speed.cpu.native import attention, linear
from sdmodule.speed.cpu.native.attention import native_attention
from sdmodule.speed.cpu.native.jit_build import is_available
from sdmodule.speed.cpu.native.linear import native_geglu, native_linear
from sdmodule.speed.cpu.padded_attention import padded_attention
from sdmodule.speed.cpu.prepacked import fused_geglu, prepacked_convolution, prepacked_linear, supports_prepacking
from sdmodule.speed.cpu.tiled_attention import ALIGNED, tiled_attention


def attention_kernels(query: Tensor, key: Tensor, value: Tensor) -> Candidates:
    """The kernels that compute attention of such tensors on this machine."""
    kernels = PADDED_ATTENTIONS if key.shape[2] % ALIGNED else ATTENTIONS
    native = attention.supports(query, key, value) and is_available(attention.SOURCE)
    return {**kernels, "native": native_attention} if native else kernels


def linear_kernels(tokens: Tensor, layer: nn.Linear) -> Candidates:
    """The kernels that compute a linear layer for such tokens ``[B, L, C]`` on this machine."""
    return {**LINEARS, "native": native_linear} if _runs_natively(tokens, layer) else LINEARS


def geglu_kernels(tokens: Tensor, layer: nn.Linear) -> Candidates:
    """The kernels that compute a GEGLU with such a projection for such tokens ``[B, L, C]`` on this machine."""
    return {**GEGLUS, "native": native_geglu} if _runs_natively(tokens, layer) else GEGLUS


def torch_linear(tokens: Tensor, layer: nn.Linear) -> Tensor:
    """Torch's linear layer, ``[B, L, C]`` to ``[B, L, D]``."""
    return F.linear(tokens, layer.weight, layer.bias)


def torch_geglu(tokens: Tensor, layer: GEGLU) -> Tensor:
    """Diffusers' gated activation, ``[B, L, C]`` to ``[B, L, D]``."""
    return GEGLU.forward(layer, tokens)


def winograd_convolution(image: Tensor, layer: Any) -> Tensor:
    """A 3x3 convolution by `winograd`; ``layer.rows`` caches the transformed weights."""
    if layer.rows is None:
        layer.rows = winograd.transform_weights(layer, image)
    return winograd.convolve(image, layer.rows, layer.bias)


def winograd_tiles_convolution(image: Tensor, layer: Any) -> Tensor:
    """A 3x3 convolution in float32 by `winograd_tiles`; ``layer.matrices`` caches the transformed weights."""
    if layer.matrices is None:
        layer.matrices = winograd_tiles.transform_weights(layer)
    return winograd_tiles.convolve(image, layer.matrices, layer.bias)


ATTENTIONS: Candidates = {TORCH: F.scaled_dot_product_attention, "tiles": tiled_attention}
PADDED_ATTENTIONS: Candidates = {**ATTENTIONS, "padded": padded_attention}
LINEARS: Candidates = {TORCH: torch_linear, "packed": prepacked_linear}
GEGLUS: Candidates = {TORCH: torch_geglu, "fused": fused_geglu}
CONVOLUTIONS: Candidates = {TORCH: prepacked_convolution, "winograd": winograd_convolution}
TILED_CONVOLUTIONS: Candidates = {**CONVOLUTIONS, "winograd tiles": winograd_tiles_convolution}
CONVOLUTION_CACHE = ("packed", "rows", "matrices")
LINEAR_CACHE = ("packed", "panels")
GEGLU_CACHE = ("halves", "panels")
"""Attributes in which layers cache transformed weights, one for each kernel."""


class FastestAttention(AttnProcessor2_0):
    """A diffusers attention processor that, without gradients, runs the fastest attention kernel."""

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
            or hidden_states.dtype == torch.float16  # tiles may overflow in it
            or _uses_torch(attn)
        ):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for tokens in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        shape = ("attention", query.shape[1:], key.shape[2], query.dtype)
        joined = fastest(attention_kernels(query, key, value), shape, query, key, value).transpose(1, 2).flatten(2)
        result = attn.to_out[1](attn.to_out[0](joined))
        return result if attn.rescale_output_factor == 1 else result / attn.rescale_output_factor


FASTEST_ATTENTION = FastestAttention()
"""One processor for all layers, since it has no state."""


class FastestLinear(nn.Linear):
    """A ``Linear`` that runs the fastest kernel; assigned through ``__class__``."""

    packed: Tensor | None = None
    panels: linear.Panels | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Tokens ``[B, L, C]`` to ``[B, L, D]``."""
        if _uses_torch(self, *LINEAR_CACHE) or input.ndim != 3:
            return super().forward(input)
        if _is_mixed(input, self.weight) or not supports_prepacking(input.dtype):
            return super().forward(input)
        shape = ("linear", input.shape[1:], self.out_features, input.dtype)
        return fastest(linear_kernels(input, self), shape, input, self)


class FastestGEGLU(GEGLU):
    """A ``GEGLU`` (Shazeer 2020) that in bfloat16 runs the fastest kernel; assigned through ``__class__``."""

    halves: list[tuple[Tensor, Tensor | None]] | None = None
    panels: linear.Panels | None = None

    @override
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens ``[B, L, C]`` to ``[B, L, D]``."""
        if _uses_torch(self, *GEGLU_CACHE) or args or kwargs or not self._can_fuse(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        shape = ("geglu", hidden_states.shape[1:], self.proj.out_features, hidden_states.dtype)
        return fastest(geglu_kernels(hidden_states, self.proj), shape, hidden_states, self)

    def _can_fuse(self, tokens: Tensor) -> bool:
        """Whether the projection is a plain linear layer in bfloat16, without hooks and adapters."""
        layer = self.proj
        hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        if type(layer) is not FastestLinear or hooked or tokens.ndim != 3:
            return False
        return (
            tokens.dtype == torch.bfloat16 and supports_prepacking(tokens.dtype) and not _is_mixed(tokens, layer.weight)
        )


class FastestConv2d(nn.Conv2d):
    """A ``Conv2d`` with prepacked weights that runs the fastest kernel; assigned through ``__class__``."""

    packed: Tensor | None = None
    rows: winograd.Kernels | None = None
    matrices: Tensor | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Convolve an image ``[B, C, h, w]``; the result is channels_last."""
        if _uses_torch(self, *CONVOLUTION_CACHE) or input.ndim != 4 or _is_mixed(input, self.weight):
            return super().forward(input)
        if not winograd.applies_to(self, input):
            return prepacked_convolution(input, self)
        tiled = winograd_tiles.applies_to(self, input)
        kernels = TILED_CONVOLUTIONS if tiled else CONVOLUTIONS
        return fastest(kernels, ("convolution", input.shape[1:], self.out_channels, input.dtype, tiled), input, self)


def can_prepack(layer: nn.Conv2d) -> bool:
    """Whether a convolution's weights can be prepacked."""
    padded = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return padded and supports_prepacking(layer.weight.dtype)


def _uses_torch(layer: nn.Module, *cached: str) -> bool:
    """Whether a layer runs torch's kernel: with gradients, and under a compiler, which chooses its own.

    With gradients its cached weights are dropped, since an optimizer step may follow.
    """
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled():
        for name in cached:
            layer.__dict__.pop(name, None)
        return True
    return False


def _runs_natively(tokens: Tensor, layer: nn.Linear) -> bool:
    """Whether this machine can run the C++ kernel of a linear layer."""
    return linear.supports(tokens, layer) and is_available(linear.SOURCE)


def _is_mixed(tokens: Tensor, weight: Tensor) -> bool:
    """Whether input and weights differ in dtype, now or under autocast."""
    return tokens.dtype != weight.dtype or torch.is_autocast_enabled("cpu")
